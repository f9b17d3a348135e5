"""The key under which a cell is stored: all that changes its numbers, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from robplug.referee.cells import Cell

KEY_VERSION = 1


@dataclass(frozen=True)
class Identity:
    """What of the surroundings changes a cell's numbers.

    Attributes:
        weights: digest of the model's parameters and buffers.
        model_source: digest of the source of the model's own classes.
        data: digest of the samples.
        plugin: digest of the source of the attack's plugin if it is installed in editable mode, else "".
        bounds: of the data.
        offers: what the model gives an attack.
        draws: whether the model is stochastic, draws averaged for an attack and for a verdict.
        versions: of the attack's plugin and library.
    """

    weights: str
    model_source: str
    data: str
    plugin: str
    bounds: tuple[float, float]
    offers: str
    draws: tuple[bool, int, int]
    versions: dict[str, str] = field(default_factory=dict)


def cell_key(cell: Cell, identity: Identity, chunk: int, batch_size: int, sources: Sequence[str] = ()) -> str:
    """Returns the SHA-256 of all that changes a cell's numbers, in canonical JSON.

    Args:
        cell: the cell.
        identity: of its target, data and attack.
        chunk: samples per unit of work.
        batch_size: samples per forward pass of the referee.
        sources: the keys of the cells whose adversarial samples are judged.

    Names of targets, devices, times and the version of torch are recorded beside the results and not keyed.
    """
    parts = {
        "key_version": KEY_VERSION,
        "target": cell.target.params,
        "attack": cell.spec.name,
        "mode": cell.mode,
        "params": cell.params,
        "threat": {"norm": cell.threat.norm, "eps": cell.threat.eps, "targeted": cell.threat.targeted},
        "goal": cell.goal,
        "seed": cell.seed,
        "chunk": chunk,
        "batch_size": batch_size,
        "timeout_s": cell.timeout_s,
        "identity": asdict(identity),
        **({"source": sources[0]} if sources else {}),
        **({"added": list(sources[1:])} if len(sources) > 1 else {}),
        **({"permuted": True} if cell.permuted else {}),
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
