"""The checks of each kind of Spec: one list for ``robplug check`` and for pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import SkipTest

import torch

from robplug.errors import InputError
from robplug.plugins import registry
from robplug.registry import resolve
from robplug.targets import evaluation_mode
from robplug.testing.attack_checks import ATTACK_CHECKS
from robplug.testing.norm_checks import NORM_CHECKS
from robplug.testing.spec_checks import check_fields_documented, check_frozen_dataclass, check_params, check_resolves
from robplug.testing.trials import require
from robplug.types import AttackSpec, DatasetSpec, DefenseSpec, NormSpec, Spec, TargetSpec

PIECES = ("prepare", "objective", "penalty", "mode", "after_step", "finish")
IMAGES = ((1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 224, 224))


def checks_for(spec: Spec) -> Iterator[Callable[[Any], None]]:
    """Yields the check functions of a Spec; each takes it as its only argument.

    A check raises AssertionError, or whatever the plugin raises, where a rule is broken, and unittest.SkipTest
    where the rule does not apply.
    """
    yield check_resolves
    if isinstance(spec, AttackSpec | DefenseSpec):
        yield from (check_frozen_dataclass, check_params, check_fields_documented)
    if isinstance(spec, AttackSpec):
        yield from ATTACK_CHECKS
    if isinstance(spec, DefenseSpec):
        yield check_pieces
    if isinstance(spec, TargetSpec):
        yield check_logits
    if isinstance(spec, DatasetSpec):
        yield check_samples
    if isinstance(spec, NormSpec):
        yield from NORM_CHECKS


def check_pieces(spec: DefenseSpec) -> None:
    """The defence has the pieces of its Spec as methods, and no others."""
    defense = resolve(spec)(**spec.params)
    has = {piece for piece in PIECES if callable(getattr(defense, piece, None))}
    unknown = sorted(set(spec.pieces) - set(PIECES))
    require(not unknown, f"there are no pieces {', '.join(unknown)}; there are {', '.join(PIECES)}")
    require(has == set(spec.pieces), f"it has the pieces {sorted(has)}, its Spec says {sorted(spec.pieces)}")


def check_logits(spec: TargetSpec) -> None:
    """A model that is listed by name maps images of a usual shape to finite logits, (N, C)."""
    if spec.accepts:
        raise SkipTest("it turns other objects into targets")
    if spec.task != "classification":
        raise SkipTest(f"its task is {spec.task}; only classification is checked")
    target = registry().target(registry().named_target(spec.name))
    with torch.no_grad(), evaluation_mode(target.module):
        for shape in IMAGES:
            x = torch.full((2, *shape), sum(target.bounds) / 2, dtype=target.dtype, device=target.device)
            try:
                logits = target.logits(x)
            except (RuntimeError, InputError):  # another shape is expected
                continue
            got = tuple(logits.shape)
            require(len(got) == 2 and got[0] == 2, f"logits of 2 images have shape {got}, expected (2, classes)")
            require(logits.isfinite().all(), "logits are not finite")
            return
    raise SkipTest(f"it takes images of none of the shapes {', '.join(map(str, IMAGES))}")


def check_samples(spec: DatasetSpec) -> None:
    """Samples are float32 inside the bounds, labels int64 and one per sample."""
    try:
        data = registry().dataset(spec.name)
    except InputError as error:  # its files are not here
        raise SkipTest(str(error)) from error
    require(data.x.dtype == torch.float32, f"x is {data.x.dtype}, expected float32")
    require(data.y.dtype == torch.int64, f"y is {data.y.dtype}, expected int64")
    require(data.y.shape == data.x.shape[:1], f"y has shape {tuple(data.y.shape)}, x {tuple(data.x.shape)}")
    low, high = data.bounds
    got = float(data.x.min()), float(data.x.max())
    require(low <= got[0] and got[1] <= high, f"x has values in {got}, the bounds are {data.bounds}")
    classes = len(data.class_names)
    highest = int(data.y.max())
    require(int(data.y.min()) >= 0, "a label is negative")
    require(not classes or highest < classes, f"a label is {highest}, and there are {classes} class names")
