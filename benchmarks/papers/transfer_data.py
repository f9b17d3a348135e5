"""Writes CIFAR-10 from numpy archives of JPEG files in its binary version, which the data set ``cifar10`` reads.

    python benchmarks/papers/transfer_data.py FOLDER OUT

FOLDER has ``cifar10/train_jpeg.npz`` and ``test_jpeg.npz``: ``blob`` (uint8, the files end to end), ``offsets`` (int64,
N+1) and ``labels`` (uint8). Not needed where the binary version itself is at hand.
"""

from __future__ import annotations

import argparse
import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

PARTS = {"train": [f"data_batch_{k}.bin" for k in range(1, 6)], "test": ["test_batch.bin"]}


def records(archive: Path) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Returns (N, 3073) bytes: the label, then the red, green and blue values, row by row."""
    with np.load(archive, allow_pickle=False) as arrays:
        blob, offsets, labels = arrays["blob"], arrays["offsets"], arrays["labels"]
    out = np.empty((len(labels), 3073), dtype=np.uint8)
    out[:, 0] = labels
    for row, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        image = Image.open(io.BytesIO(blob[start:end].tobytes())).convert("RGB")
        out[row, 1:] = np.asarray(image).transpose(2, 0, 1).reshape(-1)
    return out


def main() -> None:
    """Converts both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    chosen = parser.parse_args()
    home = chosen.out / "cifar10"
    home.mkdir(parents=True, exist_ok=True)
    for split, names in PARTS.items():
        parts = np.array_split(records(chosen.folder / "cifar10" / f"{split}_jpeg.npz"), len(names))
        for name, part in zip(names, parts, strict=True):
            (home / name).write_bytes(part.tobytes())


if __name__ == "__main__":
    main()
