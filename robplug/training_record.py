"""What a finished training leaves: its weights, and the record of what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from robplug.checkpoint import save_tensors
from robplug.errors import StoreError
from robplug.referee.store import write_json
from robplug.training_setup import differences, versions

WEIGHTS = "weights.safetensors"
RECORD = "train.json"


def save(
    folder: Path, state: Mapping[str, Tensor], identity: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> None:
    """Writes the weights, then the record, which makes them count as finished."""
    save_tensors(folder / WEIGHTS, state)
    write_json(folder / RECORD, {**identity, "history": history, **versions()})


def load(folder: Path, identity: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """Returns the weights that this training has left in a folder, or None if no training was finished there.

    Raises:
        StoreError: another training was finished there, or a file is damaged.
    """
    record, weights = folder / RECORD, folder / WEIGHTS
    if not (record.exists() and weights.exists()):
        return None
    remedy = f"choose another out, or remove {RECORD} and {WEIGHTS} to train anew"
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))
        seen = {"history", *versions()}
        other = differences(dict(identity), {key: value for key, value in stored.items() if key not in seen})
        state = load_file(weights)
    except Exception as error:  # the readers raise many types on damaged files
        raise StoreError(folder, f"its training is damaged ({type(error).__name__}: {error}); {remedy}") from error
    if other:
        raise StoreError(record, f"is of a finished training with {other}; {remedy}")
    return state
