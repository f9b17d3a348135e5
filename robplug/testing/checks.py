"""The checks of each kind of Spec: one list for ``robplug check`` and for pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from robplug.defenses import Defense, Stack
from robplug.errors import InputError
from robplug.plugins import registry
from robplug.registry import resolve
from robplug.rng import Rng
from robplug.step import Step
from robplug.targets import Target, evaluation_mode
from robplug.tasks import TASKS
from robplug.testing.attack_checks import ATTACK_CHECKS
from robplug.testing.fixtures import CLASSES, network
from robplug.testing.norm_checks import NORM_CHECKS
from robplug.testing.spec_checks import check_fields_documented, check_frozen_dataclass, check_params, check_resolves
from robplug.testing.trials import require
from robplug.types import AttackSpec, DatasetSpec, DefenseSpec, NormSpec, Spec, TargetSpec

PIECES = ("prepare", "augment", "objective", "penalty", "mode", "after_step", "finish")
BASE = "robplug/resnet20"
"""What targets that are made of others are made of here."""
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
        yield from (check_pieces, check_trains)
    if isinstance(spec, TargetSpec):
        yield check_answers
    if isinstance(spec, DatasetSpec):
        yield check_samples
    if isinstance(spec, NormSpec):
        yield from NORM_CHECKS


def check_pieces(spec: DefenseSpec) -> None:
    """The defence overrides the pieces of its Spec, and no others."""
    made = resolve(spec)
    has = sorted(piece for piece in PIECES if getattr(made, piece, None) is not getattr(Defense, piece))
    unknown = sorted(set(spec.pieces) - set(PIECES))
    require(not unknown, f"there are no pieces {', '.join(unknown)}; there are {', '.join(PIECES)}")
    require(has == sorted(spec.pieces), f"it has the pieces {has}, its Spec says {sorted(spec.pieces)}")


def check_trains(spec: DefenseSpec) -> None:
    """Two steps of training have finite losses, and the finished model gives finite logits, (N, C)."""
    scene, stack = network(), Stack([resolve(spec)(**spec.params)])
    model = scene.target.module
    try:
        stack.prepare(model)
    except InputError as error:  # it asks for a layer by name, say
        raise SkipTest(f"it cannot prepare the small model of the checks: {error}") from error
    unique = dict.fromkeys([*model.parameters(), *stack.new_parameters])
    optimizer = torch.optim.SGD(unique, lr=0.01)
    stack.train_mode()
    for number in range(2):
        losses = stack.train_batch(Step(model, scene.x, scene.y, Rng(number, range(len(scene.x)))), optimizer)
        require(losses.total.isfinite(), f"the loss of step {number} is {float(losses.total.detach())}")
    with torch.no_grad():
        logits = stack.finish().eval()(scene.x)
    require(logits.shape == (len(scene.x), CLASSES), f"after finish, logits have shape {tuple(logits.shape)}")
    require(logits.isfinite().all(), "after finish, logits are not finite")


def check_answers(spec: TargetSpec) -> None:
    """A model that is listed by name answers images of a usual shape: finite logits, or what a detector answers."""
    if spec.accepts:
        raise SkipTest("it turns other objects into targets")
    members = [registry().target(registry().named_target(BASE))] * {"none": 0, "one": 1, "several": 2}[spec.of]
    made = resolve(spec)(*members, **spec.params)
    own = spec.task == "classification" or isinstance(made, Target)
    target = registry().target(made, **({} if own else {"task": spec.task}))
    require(target.task == spec.task, f"its task is {target.task}, the Spec says {spec.task}")
    with torch.no_grad(), evaluation_mode(target.module):
        for shape in IMAGES:
            x = torch.full((2, *shape), sum(target.bounds) / 2, dtype=target.dtype, device=target.device)
            try:
                answer = target.detections(x) if spec.task == "detection" else target.logits(x)
            except (RuntimeError, InputError):  # another shape is expected
                continue
            _check_form(spec.task, answer, x)
            require(answer.isfinite().all(), "its answers are not finite")
            return
    raise SkipTest(f"it takes images of none of the shapes {', '.join(map(str, IMAGES))}")


def _check_form(task: str, answer: Tensor, x: Tensor) -> None:
    got = tuple(answer.shape)
    fits, expected = {
        "classification": (len(got) == 2, "logits of 2 images have shape {}, expected (2, classes)"),
        "segmentation": (got[2:] == x.shape[2:], "logits of 2 images have shape {}, expected (2, classes, H, W)"),
        "detection": (len(got) == 3 and got[2] == 6, "detections of 2 images have shape {}, expected (2, D, 6)"),
    }[task]
    require(got[0] == 2 and fits, expected.format(got))


def check_samples(spec: DatasetSpec) -> None:
    """Samples are float32 inside the bounds, and there are labels of the Spec's task for each."""
    try:
        data = resolve(spec)(**spec.params)
    except InputError as error:  # its files are not here
        raise SkipTest(str(error)) from error
    require(data.x.dtype == torch.float32, f"x is {data.x.dtype}, expected float32")
    require(data.task == spec.task, f"its task is {data.task}, the Spec says {spec.task}")
    low, high = data.bounds
    got = float(data.x.min()), float(data.x.max())
    require(low <= got[0] and got[1] <= high, f"x has values in {got}, the bounds are {data.bounds}")
    for task in (data.task, *data.others):
        labels, expected = data.labels(task), torch.float32 if task == "detection" else torch.int64
        require(labels.dtype == expected, f"labels are {labels.dtype}, expected {expected}")
        try:
            TASKS[task](len(data.class_names) or None).check(labels, data.x)
        except InputError as error:
            require(False, str(error))
