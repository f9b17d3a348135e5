"""Data sets of the user, read from files that are checked first: MNIST, CIFAR-10, .npz archives, folders of images."""

from __future__ import annotations

import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from robplug.data import Dataset, check_split
from robplug.errors import InputError, RobplugError

Bytes = NDArray[np.uint8]

MNIST_SOURCE = "the MNIST page of Yann LeCun has the four .gz files"
CIFAR_SOURCE = 'the CIFAR-10 page of Alex Krizhevsky has them as "CIFAR-10 binary version (suitable for C programs)"'
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_RECORD = 1 + 3 * 32 * 32
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".pgm", ".ppm")


def mnist(split: str = "test", root: str | None = None) -> Dataset:
    """MNIST from its idx files, compressed with gzip or not.

    Args:
        split: ``"train"`` (60,000 images) or ``"test"`` (10,000).
        root: folder of the files, or one that holds them in ``mnist``; None means the environment variable
            ``ROBPLUG_DATA``.

    Returns:
        x (N, 1, 28, 28) in [0, 1].

    Raises:
        InputError: a file is missing, truncated or no idx file.

    Source: LeCun, Bottou, Bengio and Haffner 1998; the idx format as described on the data set's page.
    """
    check_split(split, ("train", "test"), "mnist")
    part = {"train": "train", "test": "t10k"}[split]
    names = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
    home = _home(root, "mnist", ("mnist", "MNIST/raw"), (names[0], f"{names[0]}.gz"), MNIST_SOURCE)
    images_path, labels_path = (_plain_or_gz(home / name) for name in names)
    images = _read_idx(images_path, dimensions=3)
    labels = _read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise InputError(f"{len(images)} labels in {labels_path}, one per image", len(labels), MNIST_SOURCE)
    _check_labels(labels, labels_path, MNIST_SOURCE)
    return Dataset("mnist", _unit(images[:, None]), _labels(labels), class_names=tuple("0123456789"))


def cifar10(split: str = "test", root: str | None = None) -> Dataset:
    """CIFAR-10 from the files of its binary version.

    Args:
        split: ``"train"`` (``data_batch_1.bin`` to ``data_batch_5.bin``) or ``"test"`` (``test_batch.bin``).
        root: folder of the files, or one that holds them in ``cifar10`` or ``cifar-10-batches-bin``; None means the
            environment variable ``ROBPLUG_DATA``.

    Returns:
        x (N, 3, 32, 32) in [0, 1], channels red, green, blue.

    Raises:
        InputError: a file is missing or truncated.

    Source: Krizhevsky 2009; the format as described on the data set's page.
    """
    check_split(split, ("train", "test"), "cifar10")
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else ["test_batch.bin"]
    home = _home(root, "cifar10", ("cifar10", "cifar-10-batches-bin"), names[:1], CIFAR_SOURCE)
    records = np.concatenate([_read_cifar(home / name) for name in names])
    x = _unit(records[:, 1:].reshape(-1, 3, 32, 32))
    return Dataset("cifar10", x, _labels(records[:, 0]), class_names=CIFAR_CLASSES)


def npz(split: str = "test", root: str | None = None, bounds: Sequence[float] = (0.0, 1.0)) -> Dataset:
    """A numpy archive with the arrays x, (N, ...) numbers, and y, (N,) whole numbers.

    Args:
        split: read from ``<split>.npz`` where root is a folder; a file is taken for whatever split is asked of it.
        root: the archive, or a folder of archives; None means the environment variable ``ROBPLUG_DATA``.
        bounds: smallest and largest value that a sample may have.

    Raises:
        InputError: the file is missing or damaged, an array is missing or of another shape or type, or a value lies
            outside the bounds.
    """
    path = root_of(root, "npz", "an .npz archive is made with numpy.savez(path, x=x, y=y)")
    path = path / f"{split}.npz" if path.is_dir() else path
    x, y = _read_npz(path)
    low, high = (float(value) for value in bounds)
    if x.ndim < 2 or x.dtype.kind not in "fiu":
        raise InputError(f"x of shape (N, ...) and numbers in {path}", f"{x.shape} {x.dtype}")
    if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
        raise InputError(f"y of shape ({len(x)},) and whole numbers in {path}", f"{y.shape} {y.dtype}")
    samples = torch.from_numpy(x.astype(np.float32))
    if len(x) and not (low <= float(samples.min()) and float(samples.max()) <= high):  # also true for nan
        got = f"values from {float(samples.min()):g} to {float(samples.max()):g}"
        raise InputError(f"x inside the bounds {(low, high)} in {path}", got, "scale x, or pass bounds=")
    if len(y) and int(y.min()) < 0:
        raise InputError(f"labels y >= 0 in {path}", int(y.min()))
    return Dataset(path.stem, samples, _labels(y), (low, high))


def folder(split: str = "test", root: str | None = None) -> Dataset:
    """Images in one folder per class, all of one size, all grey or all RGB.

    Args:
        split: images lie in ``root/<split>/<class>/``, for ``"all"`` in ``root/<class>/``.
        root: the folder; None means the environment variable ``ROBPLUG_DATA``.

    Returns:
        x (N, C, H, W) in [0, 1]; classes are numbered by the order of their folders' names.

    Raises:
        InputError: there is no image, or one is damaged, of another size or mode, or of another kind of file.
    """
    remedy = "images belong in root/<split>/<class>/, or with split='all' in root/<class>/"
    top = root_of(root, "folder", remedy)
    top = top if split == "all" else top / split
    classes = sorted(path for path in top.iterdir() if path.is_dir()) if top.is_dir() else []
    files = [(path, label) for label, name in enumerate(classes) for path in _visible(name)]
    if not files:
        raise InputError(f"folders of images in {top}", "none", remedy)
    images = np.stack(_same_size([path for path, _ in files]))
    y = _labels(np.array([label for _, label in files]))
    return Dataset(top.name, _unit(images.transpose(0, 3, 1, 2)), y, class_names=tuple(path.name for path in classes))


def root_of(root: str | None, name: str, source: str) -> Path:
    """Returns the folder that a user named, or that the environment variable ``ROBPLUG_DATA`` names."""
    given = root or os.environ.get("ROBPLUG_DATA")
    if not given:
        remedy = f"pass root= or set the environment variable ROBPLUG_DATA; {source}"
        raise InputError(f"a folder of {name}", "none", remedy)
    path = Path(given).expanduser()
    if not path.exists():
        raise InputError(f"{name} in {path}", "no such file or folder", source)
    return path


def _home(root: str | None, name: str, below: Sequence[str], first: Sequence[str], source: str) -> Path:
    """Returns the folder that holds the first file, root itself or one of the usual folders below it."""
    top = root_of(root, name, source)
    folders = [top, *(top / sub for sub in below)]
    for candidate in folders:
        if any((candidate / file).is_file() for file in first):
            return candidate
    looked = ", ".join(str(candidate) for candidate in folders)
    raise InputError(f"the file {' or '.join(first)} in one of {looked}", "none", source)


def _plain_or_gz(path: Path) -> Path:
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.is_file() else path


def _read_idx(path: Path, dimensions: int) -> Bytes:
    """Reads an idx file of bytes: two zeros, 8 (bytes), the number of axes, the axes in big endian, the values."""
    content = _read_bytes(path, MNIST_SOURCE)
    magic = bytes([0, 0, 8, dimensions])
    if content[:4] != magic:
        raise InputError(
            f"magic number {magic.hex()} at the start of {path}", content[:4].hex() or "an empty file", MNIST_SOURCE
        )
    header = 4 + 4 * dimensions
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    size = header + math.prod(shape)
    if len(content) != size:
        raise InputError(f"{size} bytes for shape {tuple(shape)} in {path}", len(content), MNIST_SOURCE)
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _read_cifar(path: Path) -> Bytes:
    content = _read_bytes(path, CIFAR_SOURCE)
    if not content or len(content) % CIFAR_RECORD:
        expected = f"a multiple of {CIFAR_RECORD} bytes in {path} (30730000 as published)"
        raise InputError(expected, len(content), CIFAR_SOURCE)
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, CIFAR_RECORD)
    _check_labels(records[:, 0], path, CIFAR_SOURCE)
    return records


def _read_bytes(path: Path, source: str) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"the file {path}", "no such file", source) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"a whole gzip or plain file {path}", f"{type(error).__name__}: {error}", source) from error


def _read_npz(path: Path) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["x"], arrays["y"]
    except KeyError:
        raise InputError(f"arrays x and y in {path}", "an archive without", "numpy.savez(path, x=x, y=y)") from None
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zlib.error, zipfile.BadZipFile) as error:
        remedy = "make it with numpy.savez(path, x=x, y=y); pickled objects are not loaded"
        raise InputError(f"a numpy archive {path}", f"{type(error).__name__}: {error}", remedy) from error


def _visible(top: Path) -> list[Path]:
    return sorted(path for path in top.iterdir() if not path.name.startswith("."))


def _same_size(paths: Sequence[Path]) -> list[Bytes]:
    images = [read_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            expected = f"{path} of (height, width, channels) {images[0].shape} like {paths[0]}"
            raise InputError(expected, image.shape, "resize the images to one size and one mode")
    return images


def read_image(path: Path) -> Bytes:
    """Returns an image as (H, W, C)."""
    if path.suffix.lower() not in IMAGES:
        raise InputError(f"an image ({' '.join(IMAGES)})", path, "move other files out of the class folders")
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise RobplugError("reading images needs the package pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"a whole image in {path}", f"{type(error).__name__}: {error}") from error
    if mode not in ("L", "RGB"):
        raise InputError(f"a grey (L) or RGB image in {path}", f"mode {mode}", "convert it")
    return values[..., None] if mode == "L" else values


def _check_labels(labels: Bytes, path: Path, source: str) -> None:
    if len(labels) and labels.max() > 9:
        raise InputError(f"labels 0 to 9 in {path}", int(labels.max()), source)


def _labels(labels: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def _unit(images: Bytes) -> torch.Tensor:
    """Returns bytes as float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).div_(255.0)
