"""Checkpoints of a training: two files written one after the other, the second of which makes the first count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from robplug.errors import StoreError
from robplug.referee.store import write_atomically

_PREFIX = "checkpoint-"
FILES = f"{_PREFIX}*"


@dataclass(frozen=True)
class Checkpoint:
    """A training after some of its steps.

    Attributes:
        step: steps made.
        tensors: parameters and buffers, by name.
        optimizer: the optimizer's state.
        record: plain values: what is trained, and what has been seen so far.
    """

    step: int
    tensors: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    record: Mapping[str, Any]

    def save(self, folder: Path) -> None:
        """Writes the checkpoint, then removes older ones."""
        name = f"{_PREFIX}{self.step:09d}"
        save_tensors(folder / f"{name}.safetensors", self.tensors)
        content = {"optimizer": dict(self.optimizer), "record": dict(self.record)}
        write_atomically(folder / f"{name}.pt", lambda path: torch.save(content, path))
        clear(folder, but=name)


def load(folder: Path) -> Checkpoint | None:
    """Returns the newest checkpoint of a folder, or None if there is none.

    Raises:
        StoreError: it is damaged.
    """
    marks = sorted(folder.glob(f"{_PREFIX}*.pt"))
    if not marks:
        return None
    try:
        content = torch.load(marks[-1], map_location="cpu", weights_only=True)
        tensors = load_file(marks[-1].with_suffix(".safetensors"))
        step = int(marks[-1].stem.removeprefix(_PREFIX))
        return Checkpoint(step, tensors, content["optimizer"], content["record"])
    except Exception as error:  # the readers raise many types on damaged files
        remedy = f"remove {FILES} to start over"
        raise StoreError(marks[-1], f"is damaged ({type(error).__name__}: {error}); {remedy}") from error


def clear(folder: Path, but: str = "") -> None:
    """Removes the checkpoints of a folder, all but the one of this name."""
    # marks go first: a set of weights without its mark is no checkpoint
    for path in (*folder.glob(f"{_PREFIX}*.pt"), *folder.glob(f"{_PREFIX}*.safetensors")):
        if path.stem != but:
            path.unlink()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors, atomically; names that share memory get a copy each."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: temporary.write_bytes(save(copies)))
