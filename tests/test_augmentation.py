"""Crops and flips against slices of the padded image, and the hook that trains on them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.augmentation import CropFlip
from robplug.defenses import Defense, Stack
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.step import Step

X = torch.rand(64, 2, 5, 7, generator=torch.Generator().manual_seed(0))


def a_step(x: Tensor = X, bounds: tuple[float, float] = (0.0, 1.0), ids: range | None = None) -> Step:
    return Step(nn.Identity(), x, torch.zeros(len(x), dtype=torch.int64), Rng(0, ids or range(len(x))), bounds)


def windows(image: Tensor, padding: int, value: float, flip: bool) -> list[Tensor]:
    """All that a crop of an image can be."""
    padded = F.pad(image, (padding,) * 4, value=value)
    height, width = image.shape[1:]
    cuts = [padded[:, i : i + height, j : j + width] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
    return cuts + ([cut.flip(2) for cut in cuts] if flip else [])


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True)])
def test_each_image_is_one_of_its_windows_and_all_of_them_occur(padding: int, flip: bool) -> None:
    places = set()
    for turn in range(8):
        out = CropFlip(padding, flip).augment(a_step(ids=range(64 * turn, 64 * turn + 64)))
        assert out.shape == X.shape and out.is_contiguous()
        for before, after in zip(X, out, strict=True):
            cuts = windows(before, padding, 0.0, flip)
            places.add(next(place for place, cut in enumerate(cuts) if torch.equal(cut, after)))
    assert len(places) == len(windows(X[0], padding, 0.0, flip))


def test_what_is_added_lies_inside_the_bounds() -> None:
    out = CropFlip(4).augment(a_step(X + 2, bounds=(2.0, 3.0)))
    assert out.min() == 2.0 and (out == 2.0).any()


def test_an_image_is_cropped_alike_in_any_company() -> None:
    together, alone = CropFlip().augment(a_step()), CropFlip().augment(a_step(X[7:8], ids=range(7, 8)))
    assert torch.equal(together[7:8], alone)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="padding >= 0, got -1"):
        CropFlip(-1)
    with pytest.raises(InputError, match="images"):
        CropFlip().augment(a_step(torch.rand(3, 4)))


@dataclass(frozen=True)
class Add(Defense):
    """Adds a number to the samples, or doubles them."""

    number: float = 0.0

    def augment(self, step: Step) -> Tensor:
        return step.x + self.number if self.number else step.x * 2


@dataclass(frozen=True)
class Seen(Defense):
    """Returns what it was asked to be trained on, as a loss and as a penalty."""

    def objective(self, step: Step) -> Tensor:
        return step.clean().x.sum()

    def penalty(self, step: Step) -> Tensor:
        return step.x.sum()


def test_a_stack_augments_in_order_before_all_else() -> None:
    stack = Stack([Add(1.0), Seen(), Add()])
    stack.prepare(nn.Identity())
    losses = stack.losses(a_step(torch.ones(3, 1), bounds=(0.0, 9.0)))
    assert float(losses.objective) == float(losses.penalties["Seen"]) == 3 * (1 + 1) * 2


def test_held_out_samples_are_scored_as_they_are() -> None:
    stack = Stack([Add(1.0)])
    stack.prepare(nn.Identity())
    step = a_step(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert stack.score(step).tolist() == [True, False] and torch.equal(step.x, torch.eye(2))


class Peek(Defense):
    """Looks at the network's answer before it changes the samples."""

    def augment(self, step: Step) -> Tensor:
        return step.clean().x.detach() + 1


def test_an_augmentation_may_ask_the_network_and_leaves_no_trace() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    step = Step(model, torch.rand(6, 4), torch.zeros(6, dtype=torch.int64), Rng(0, range(6)))
    before = step.x
    stack = Stack([Peek()])
    stack.prepare(model)
    stack.losses(step)
    assert torch.equal(step.clean().x, before + 1)
    assert int(model[0].num_batches_tracked) == 1  # the objective's pass alone


@dataclass(frozen=True)
class Draw(Defense):
    """Replaces the samples by draws, and notes what an attack's first start would draw."""

    drawn: list[Tensor]

    def augment(self, step: Step) -> Tensor:
        return step.rng.uniform((2,), like=step.x)

    def objective(self, step: Step) -> Tensor:
        self.drawn.append(step.rng.at_restart(0).uniform((2,), like=step.x))
        return step.clean().x.sum()


def test_augmentation_and_attack_draw_from_different_streams() -> None:
    drawn: list[Tensor] = []
    stack = Stack([Draw(drawn)])
    stack.prepare(nn.Identity())
    step = Step(nn.Identity(), torch.rand(5, 2), torch.zeros(5, dtype=torch.int64), Rng(0, range(5)))
    stack.losses(step)
    assert not (step.x == drawn[0]).any() and step.rng.restart == 0
