"""The attack on segmentation networks: closed forms, what is a target, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.errors import InputError, ThreatError
from robplug.norms import LINF
from robplug.referee.guard import Assignment, run_guarded
from robplug.referee.verify import NOTHING, Batch, answers, verify
from robplug.rng import Rng
from robplug.targets import Target
from robplug.tasks import task_of
from robplug.types import Perturbed, ThreatModel
from robplug_dag.attack import SegmentationAdversary

THREAT = ThreatModel("linf", None)
CYCLE = (1, 2, 3, 0)
SIDE = 5


class Colours(nn.Module):
    """The logit of class k is colour channel k of the pixel, that of the background a half."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.full_like(x[:, :1], 0.5), x], 1)


def colours(**options: Any) -> Target:
    return robplug.target(Colours(), task="segmentation", **options)


def painted(labels: Tensor) -> Tensor:
    """Returns grey images .4 where each pixel's own channel is .6; the background has none."""
    x = torch.full((len(labels), 3, *labels.shape[1:]), 0.4, dtype=torch.float64)
    for label in (1, 2, 3):
        x[:, label - 1][labels == label] = 0.6
    return x


def scene() -> tuple[Tensor, Tensor]:
    """Returns three images and labels; the last has no pixel to attack."""
    labels = torch.randint(0, 4, (3, SIDE, SIDE))
    labels[2] = 0
    x = painted(labels)
    x[0, :, 0, 0] = x[1, :, 2, 3] = x.new_tensor([0.4, 0.4, 0.6])
    labels[0, 0, 0] = labels[1, 2, 3] = 255  # looks like class 3
    return x, labels


def attacked(attack: SegmentationAdversary, target: Target, x: Tensor, y: Tensor | None, ids: Any = None) -> Perturbed:
    threat = ThreatModel("linf", None, target.bounds)
    return attack.run(target, x, y, threat, Rng(0, range(len(x)) if ids is None else ids))


def test_one_pixel_at_a_time_has_a_closed_form() -> None:
    """Own channel down and goal's up by gamma a step, until .6 - m gamma < .5 or .4 + m gamma: 4 steps of .03."""
    x, y = scene()
    found = attacked(SegmentationAdversary(gamma=0.03, steps=10, permutation=CYCLE), colours(), x, y)
    expected = x.clone()
    for label in (1, 2, 3):
        expected[:, label - 1][y == label] -= 0.12
        if CYCLE[label]:  # the background's logit does not depend on the image
            expected[:, CYCLE[label] - 1][y == label] += 0.12
    torch.testing.assert_close(found.x_adv, expected, rtol=0, atol=1e-12)
    assert found.claim is not None and found.claim.tolist() == [True, True, False]
    counts = ((y > 0) & (y < 255)).flatten(1).sum(1).tolist()
    assert found.trace is not None and found.witness is None
    assert found.trace.tolist() == [[count] * 4 + [0] * 6 for count in counts]


def test_background_and_ignored_pixels_are_left_alone() -> None:
    x, y = scene()
    x_adv = attacked(SegmentationAdversary(gamma=0.03), colours(), x, y).x_adv
    left = ((y == 0) | (y == 255))[:, None].expand_as(x)
    assert torch.equal(x_adv[left], x[left]) and torch.equal(x_adv[2], x[2])
    assert ((x_adv != x).any(1) == ~left[:, 0]).all()


def test_the_referee_says_that_there_is_nothing_to_attack() -> None:
    x, y = scene()
    target = colours(classes=4)
    task = task_of(target)
    batch = Batch([3, 4, 5], x, y, None, answers(task, target, x, 8), task)
    rows = batch.attacked
    job = Assignment(SegmentationAdversary(gamma=0.03), target, LINF, THREAT, x[rows], y[rows], None, Rng(0, [3, 4]))
    outcome = run_guarded(job)
    assert not outcome.error and not outcome.notes
    judged = verify(target, LINF, THREAT, batch, outcome, 8).rows
    assert [row.status for row in judged] == ["broken", "broken", "unattacked"]
    assert judged[2].note == NOTHING and judged[0].claim is True
    assert judged[0].scores["clean.foreground"] == 1.0 and judged[0].scores["adv.foreground"] == 0.0
    assert judged[0].distance == pytest.approx(0.12)


@pytest.mark.parametrize(("rule", "steps"), [("label", 3), ("goal", 8)])
def test_the_rule_says_when_a_pixel_is_done(rule: Any, steps: int) -> None:
    """Class 1 falls behind the background after 3 steps of .04, and channel 2 rises from .2 above it after 8."""
    y = torch.ones(1, 1, 1, dtype=torch.int64)
    x = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64).view(1, 3, 1, 1)
    found = attacked(SegmentationAdversary(gamma=0.04, steps=20, rule=rule, permutation=CYCLE), colours(), x, y)
    move = 0.04 * steps
    torch.testing.assert_close(found.x_adv[0, :, 0, 0], x.new_tensor([0.6 - move, 0.2 + move, 0.2]))
    assert found.trace is not None and found.trace[0].tolist() == [1.0] * steps + [0.0] * (20 - steps)


def test_random_permutations_belong_to_the_sample_and_the_seed() -> None:
    """Neighbours change nothing; a class goes to one class in an image, never to itself, and images differ."""
    y = torch.arange(4).repeat(6, 5, 1)
    x, attack, target = painted(y), SegmentationAdversary(gamma=0.03, steps=1), colours()
    ids = [4, 8, 15, 16, 23, 42]
    together = attacked(attack, target, x, y, ids).x_adv
    for place, sample in enumerate(ids):
        alone = attacked(attack, target, x[place : place + 1], y[place : place + 1], [sample]).x_adv
        assert torch.equal(alone[0], together[place])
    reordered = attacked(attack, target, x.flip(0), y.flip(0), ids[::-1]).x_adv
    assert torch.equal(reordered.flip(0), together)
    risen = (together - x > 0.02).any(2)  # (N, 3, class of the pixel): which channel a class is drawn to
    assert not risen[:, 0, 1].any() and not risen[:, 1, 2].any() and not risen[:, 2, 3].any()
    assert (risen[:, :, 1:].sum(1) <= 1).all() and len({tuple(one.flatten().tolist()) for one in risen}) > 1
    other = attack.run(target, x, y, THREAT, Rng(1, ids)).x_adv
    assert not torch.equal(other, together)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)])
def test_the_step_is_half_a_grey_level_of_the_bounds(bounds: tuple[float, float]) -> None:
    y = torch.ones(1, 2, 2, dtype=torch.int64)
    low, high = bounds
    x = torch.full((1, 3, 2, 2), (low + high) / 2, dtype=torch.float64)
    x[:, 0] += 0.1 * (high - low)
    module = nn.Conv2d(3, 4, 1, bias=False).double()
    module.weight.data[:] = torch.eye(4)[:, 1:, None, None]
    target = robplug.target(module, task="segmentation", bounds=bounds)
    assert target.predict(x).eq(1).all()
    change = attacked(SegmentationAdversary(steps=1), target, x, y).x_adv - x
    assert float(change.abs().max()) == pytest.approx(0.5 / 255 * (high - low))


def test_without_labels_the_own_predictions_are_attacked() -> None:
    x, y = scene()
    attack = SegmentationAdversary(gamma=0.03)
    predicted = Colours()(x).argmax(1)
    found = attacked(attack, colours(), x, None).x_adv
    assert torch.equal(found, attacked(attack, colours(), x, predicted).x_adv)
    assert not torch.equal(found, attacked(attack, colours(), x, y).x_adv)


def test_a_network_in_train_mode_is_attacked_in_eval_mode_and_put_back() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    module[2].eval()
    target, before = robplug.target(module, task="segmentation"), {k: v.clone() for k, v in module.state_dict().items()}
    x, y = torch.rand(2, 3, 6, 6), torch.randint(0, 4, (2, 6, 6))
    attacked(SegmentationAdversary(steps=3), target, x, y)
    assert [part.training for part in module.modules()] == [True, True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


class Smaller(Colours):
    """Its logits are of half the size."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :, ::2, ::2]


class NoGradient(Colours):
    """The gradient of the second image is not a number."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: grad.index_fill(0, torch.tensor(1), torch.nan))
        return super().forward(x)


class OneClass(nn.Module):
    """It has but the background."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1]


def segmenter(module: nn.Module, **options: Any) -> Target:
    return robplug.target(module, task="segmentation", **options)


X, Y = painted(torch.ones(2, 4, 4).long()), torch.ones(2, 4, 4, dtype=torch.int64)
DAG = SegmentationAdversary


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: attacked(DAG(), segmenter(OneClass()), X, 0 * Y), InputError, "two or more classes, got 1"),
        (lambda: attacked(DAG(), segmenter(Smaller()), X, Y), ValueError, "lower resolution, upsample them"),
        (lambda: attacked(DAG(), segmenter(Smaller()), X, None), InputError, r"images' size \(4, 4\), got \(2, 2\)"),
        (lambda: attacked(DAG(gamma=1e-6), segmenter(NoGradient()), X, Y), InputError, "finite gradient.* image 1"),
        (lambda: attacked(DAG(permutation=(1, 2, 0)), colours(), X, Y), InputError, "permutation of the 4 classes"),
        (lambda: attacked(DAG(permutation=(3, 1, 0, 2)), colours(), X, Y), InputError, "every label, got 1 -> 1"),
        (lambda: DAG(permutation=(0, 0, 1)), InputError, r"a permutation, such as .* got \[0, 0, 1\]"),
        (lambda: DAG(permutation=(1.5, 0.5)), InputError, "a permutation, such as"),  # type: ignore[arg-type]
        (lambda: attacked(DAG(), colours(), X, 4 * Y), InputError, "below 4.*got 4 to 4"),
        (lambda: attacked(DAG(), colours(), X, Y[:, :2]), InputError, r"y of shape \(2, 4, 4\)"),
        (lambda: DAG(gamma=-1.0), InputError, "gamma > 0, got -1.0"),
        (lambda: DAG(steps=0), InputError, "steps >= 1, got 0"),
        (lambda: DAG(rule="other"), InputError, "rule 'label' or 'goal'"),  # type: ignore[arg-type]
        (
            lambda: DAG().run(colours(), X, Y, ThreatModel("linf", 0.1), Rng(0, range(2))),
            ThreatError,
            'has no budget, use eps = "minimal"',
        ),
        (
            lambda: DAG().run(colours(), X, Y, ThreatModel("linf", targeted=True), Rng(0, range(2)), y_goal=Y),
            ThreatError,
            "no goals for segmentation",
        ),
        (lambda: attacked(DAG(), colours(offers="scores"), X, Y), ThreatError, "with gradients, got one with scores"),
        (lambda: attacked(DAG(), robplug.target(Colours()), X, Y), ThreatError, "for segmentation, got one for clas"),
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
