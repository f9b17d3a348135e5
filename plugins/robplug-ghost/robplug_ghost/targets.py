"""Ensembles of ghosts as targets: without ``ghosts`` a new one for each forward pass, else the mean logits of K."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from robplug.errors import InputError
from robplug.targets import Target
from robplug_ghost.network import GhostNetwork


def skip_erosion(
    *targets: Target,
    skip: float = 0.22,
    shortcuts: Sequence[str] | None = None,
    ghosts: int | None = None,
    seed: int = 0,
) -> Target:
    """Returns ghosts of one target by skip erosion; see `robplug_ghost.GhostNetwork` for the parameters.

    Bounds, classes and what it offers are those of the base, whose layers it shares. It is stochastic where each
    forward pass has a new ghost.

    Raises:
        InputError: there is not exactly one base, or `GhostNetwork` refuses it.
    """
    return _eroded(targets, ghosts, skip=skip, shortcuts=shortcuts, seed=seed)


def dropout_erosion(
    *targets: Target,
    dropout: float = 0.994,
    blocks: Sequence[str] | None = None,
    ghosts: int | None = None,
    seed: int = 0,
) -> Target:
    """Returns ghosts of one target by dropout erosion; as `skip_erosion` in all else."""
    return _eroded(targets, ghosts, dropout=dropout, blocks=blocks, seed=seed)


def both(
    *targets: Target,
    skip: float = 0.22,
    shortcuts: Sequence[str] | None = None,
    dropout: float = 0.994,
    blocks: Sequence[str] | None = None,
    ghosts: int | None = None,
    seed: int = 0,
) -> Target:
    """Returns ghosts of one target by both erosions; as `skip_erosion` in all else."""
    params = {"skip": skip, "shortcuts": shortcuts, "dropout": dropout, "blocks": blocks}
    return _eroded(targets, ghosts, seed=seed, **params)


def _eroded(targets: Sequence[Target], ghosts: int | None, **params: Any) -> Target:
    if len(targets) != 1:
        remedy = 'name it in the plan: of = ["my-resnet"]; ghosts of several are an ensemble of such targets'
        raise InputError("one target to make ghosts of", len(targets), remedy)
    (base,) = targets
    if base.task != "classification":
        raise InputError("a target for classification", base.task)
    module = GhostNetwork(base.module, ghosts=ghosts, **params)
    return dataclasses.replace(base, module=module, stochastic=base.stochastic or ghosts is None)
