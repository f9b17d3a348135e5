"""Dense Adversary Generation as attacks of the host, for segmentation networks and detectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robplug.data import IGNORE
from robplug.errors import InputError, ThreatError
from robplug.inputs import check_batch
from robplug.rng import Rng
from robplug.targets import Target, settled
from robplug.tasks import PADDING, TASKS, overlap
from robplug.types import Perturbed, ThreatModel
from robplug.vision.protocol import Proposals
from robplug_dag.dense import Descent, Record, descend
from robplug_dag.goals import leave_out, permuted_goals, random_permutations
from robplug_dag.kernels.ops import Rule

BACKGROUND = 0


@dataclass(frozen=True)
class _DenseAdversary:
    """What both attacks share.

    Attributes:
        gamma: length of a step, the largest change of a value; None means half a 255th of the bounds' width.
        steps: largest number of steps.
        rule: ``"label"``: a target is active while it is predicted as its label (Algorithm 1); ``"goal"``: until it is
            predicted as its goal (the authors' code).
        permutation: the class that each class is to become, the same in all images; None draws one for each image in
            which no class stays what it is.
    """

    gamma: float | None = None
    steps: int = 200
    rule: Rule = "label"
    permutation: Sequence[int] | None = None

    def __post_init__(self) -> None:
        self._descent((0.0, 1.0))  # refuses what makes no sense
        if self.permutation is not None and sorted(self.permutation) != list(range(len(self.permutation))):
            raise InputError("a permutation, such as [1, 2, 0], or None", list(self.permutation))

    def _descent(self, bounds: tuple[float, float]) -> Descent:
        gamma = 0.5 / 255 * (bounds[1] - bounds[0]) if self.gamma is None else self.gamma
        return Descent(gamma, self.steps, self.rule, bounds)

    def _permutations(self, classes: int, rng: Rng) -> Tensor:
        """Returns what each class is to become, (classes,) of all images or (N, classes)."""
        if self.permutation is None:
            return random_permutations(classes, rng)
        if len(self.permutation) != classes:
            raise InputError(f"a permutation of the {classes} classes", list(self.permutation))
        return torch.tensor(self.permutation, dtype=torch.int64)


@dataclass(frozen=True)
class SegmentationAdversary(_DenseAdversary):
    """DAG for segmentation: every labelled pixel but the background is to change its class.

    The image is returned as it is where no pixel is to change. There is no budget: the perturbation grows by ``gamma``
    in each step, until no target is left.

    Source: Xie et al. 2017, Algorithm 1; sections 2.3.1 and 2.3.3 of the dissertation.
    """

    def run(
        self,
        target: Target,
        x: Tensor,
        y: Tensor | None,
        threat: ThreatModel,
        rng: Rng,
        *,
        y_goal: Tensor | None = None,
    ) -> Perturbed:
        """Attacks images (N, C, H, W); see `robplug.types.Attack.run`.

        Raises:
            ThreatError: the threat has an eps, or the target is no segmentation network with gradients.
            InputError: images, labels or logits do not fit, or a logit or gradient is not finite.
        """
        labels, classes = _checked(target, x, y, threat, y_goal, "segmentation")
        labels = leave_out(labels, BACKGROUND, IGNORE)
        goals = permuted_goals(labels, self._permutations(classes, rng).to(x.device))
        with settled(target.module):
            found = descend(lambda images, _: target.logits(images), x, labels, goals, self._descent(threat.bounds))
        return _perturbed(*found)


@dataclass(frozen=True)
class DetectionAdversary(_DenseAdversary):
    """DAG for detection: every proposal that stands for an object is to change its class.

    A proposal is a target if it overlaps an object, and is classified as it, by more than ``positive`` each; of several
    objects it stands for the one it overlaps most. The proposal stage keeps more of them for the attack. An image
    without targets is returned as it is, with the claim false and a trace of zeros.

    Source: Xie et al. 2017, Algorithm 1; sections 2.3.2 and 2.3.5 of the dissertation.

    Attributes:
        nms_threshold: of the proposal stage during the attack; the detector's own is put back afterwards.
        positive: smallest overlap and confidence of a target.
        refresh: steps after which the proposals are made anew, on the image as it is then; None keeps the first ones,
            as the paper does.
    """

    steps: int = 150
    nms_threshold: float = 0.9
    positive: float = 0.1
    refresh: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nms_threshold", "positive"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} between 0 and 1", getattr(self, name), "the paper's are .9 and .1")
        if self.refresh is not None and self.refresh < 1:
            raise InputError("refresh >= 1, or None", self.refresh)

    def run(
        self,
        target: Target,
        x: Tensor,
        y: Tensor | None,
        threat: ThreatModel,
        rng: Rng,
        *,
        y_goal: Tensor | None = None,
    ) -> Perturbed:
        """Attacks images (N, C, H, W); see `robplug.types.Attack.run`.

        Raises:
            ThreatError: the threat has an eps, or the target is no detector with gradients.
            InputError: images or boxes do not fit, or a logit or gradient is not finite.
        """
        objects, classes = _checked(target, x, y, threat, y_goal, "detection")
        permutations = self._permutations(classes, rng).to(x.device)
        with settled(target.module), denser_proposals(target, self.nms_threshold):
            return _perturbed(*self._rounds(target, x.detach(), objects, permutations, threat.bounds))

    def _rounds(
        self, target: Target, x: Tensor, objects: Tensor, permutations: Tensor, bounds: tuple[float, float]
    ) -> tuple[Tensor, Record]:
        """Runs Algorithm 1, anew with new proposals every ``refresh`` steps."""
        how = self._descent(bounds)
        each = self.refresh or self.steps
        x_adv, start, records = x, None, []
        for begun in range(0, self.steps, each):
            with torch.no_grad():
                made = target.proposals(x_adv)
            if made.logits[made.valid].isnan().any():
                raise InputError("finite logits of the proposals", f"nan in step {begun}")
            labels = targets(made.boxes, made.logits, made.valid, objects, self.positive)
            goals = permuted_goals(labels, permutations)

            def logits_of(images: Tensor, rows: Tensor, made: Proposals = made) -> Tensor:
                return target.rescore(images, made.select(rows))

            here = replace(how, steps=min(each, self.steps - begun))
            x_adv, record = descend(logits_of, x, labels, goals, here, start)
            start = record.r
            records.append(record)
        return x_adv, _joined(records)


def targets(boxes: Tensor, logits: Tensor, valid: Tensor, objects: Tensor, positive: float) -> Tensor:
    """Returns the label of each proposal that stands for an object, (N, R) int64, and -1 for the others.

    Args:
        boxes: (N, R, 4) x1, y1, x2, y2.
        logits: (N, R, C), class 0 the background.
        valid: (N, R) bool.
        objects: (N, M, 5) boxes with labels, padded with label -1.
        positive: overlap with the object and probability of its class must both be larger.

    Source: Xie et al. 2017; section 2.3.2 of the dissertation.
    """
    real = objects[..., 4] != PADDING
    label = objects[..., 4].long().clamp_min(0)
    iou = overlap(boxes, objects[..., :4])
    confidence = logits.softmax(2).gather(2, label[:, None].expand(-1, boxes.shape[1], -1))
    stands = (iou > positive) & (confidence > positive) & real[:, None] & valid[..., None]
    best = iou.masked_fill(~stands, -1.0)
    if not best.shape[2]:
        return torch.full(valid.shape, -1, dtype=torch.int64, device=boxes.device)
    most, which = best.max(2)
    return label.gather(1, which).masked_fill(most < 0, -1)


@contextmanager
def denser_proposals(target: Target, nms_threshold: float) -> Iterator[None]:
    """Inside, the detector's proposal stage drops a proposal only at a larger overlap with a better one."""
    module = target.module
    before = module.nms_threshold
    module.nms_threshold = nms_threshold  # type: ignore[assignment]
    try:
        yield
    finally:
        module.nms_threshold = before


def _checked(
    target: Target, x: Tensor, y: Tensor | None, threat: ThreatModel, y_goal: Tensor | None, task: str
) -> tuple[Tensor, int]:
    """Returns the labels and the number of classes, after checks."""
    if threat.eps is not None:
        raise ThreatError(
            f'expected a threat without eps, got eps={threat.eps}; DAG has no budget, use eps = "minimal"'
        )
    if target.task != task:
        raise ThreatError(f"expected a target for {task}, got one for {target.task}")
    if target.offers != "gradients":
        raise ThreatError(f"expected a target with gradients, got one with {target.offers}")
    labels = check_batch(target, x, y, threat, y_goal)
    classes = target.count_classes(x)
    TASKS[task](classes).check(labels, x)  # the target need not have known its classes
    return labels, classes


def _perturbed(x_adv: Tensor, record: Record) -> Perturbed:
    converged = torch.tensor([status == "converged" for status in record.status], device=x_adv.device)
    return Perturbed(x_adv, None, converged, record.active.float())


def _joined(records: Sequence[Record]) -> Record:
    """Returns the record of several rounds as one; without targets in the last one, an image has lost those it had."""
    iterations = torch.stack([record.iterations for record in records]).sum(0)
    each = zip(*(record.status for record in records), strict=True)
    status = tuple("converged" if set(own[:-1]) - {own[-1]} and own[-1] == "no targets" else own[-1] for own in each)
    return Record(records[-1].r, iterations, torch.cat([record.active for record in records], 1), status)
