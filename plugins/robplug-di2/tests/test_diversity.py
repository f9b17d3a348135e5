"""The random draws of input diversity, and its use with the host's loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.types import Attack
from robplug_di2 import InputDiversity

X = torch.rand(6, 3, 20, 20)


def views(diversity: InputDiversity, count: int, x: Tensor = X, seed: int = 0) -> list[Tensor]:
    rng = Rng(seed, range(len(x)))
    return [diversity(x, rng) for _ in range(count)]


def boxes(view: Tensor, fill: float = 0.5) -> list[list[int]]:
    """Returns top, left, height and width of what is not padding, for images without that value."""
    found = []
    for image in view:
        rows, cols = (image[0] != fill).any(1).nonzero(), (image[0] != fill).any(0).nonzero()
        top, left = int(rows.min()), int(cols.min())
        found.append([top, left, int(rows.max()) - top + 1, int(cols.max()) - left + 1])
    return found


def test_the_papers_sizes() -> None:
    assert InputDiversity().sides(299) == (299, 330)
    assert InputDiversity(ratio=0.9).sides(10) == (9, 10)


def test_draws_are_uniform_over_the_papers_intervals() -> None:
    """Sizes from [20, 22), offsets from [0, 22 - size): never a whole border on one side, as in the authors' code."""
    seen = [tuple(boxes(view)[0]) for view in views(InputDiversity(p=1.0), 600)]
    expected = {(t, u, 20, 20) for t in range(2) for u in range(2)} | {(0, 0, 21, 21)}
    assert set(seen) == expected
    assert seen.count((0, 0, 21, 21)) == pytest.approx(300, abs=60)
    assert all(seen.count(box) == pytest.approx(75, abs=35) for box in expected - {(0, 0, 21, 21)})


def test_p_is_the_share_of_steps() -> None:
    whole = [view is X for view in views(InputDiversity(p=0.3), 500)]
    assert sum(whole) == pytest.approx(350, abs=40)
    assert views(InputDiversity(p=0.0), 1)[0] is X
    assert all(view.shape == (6, 3, 22, 22) for view in views(InputDiversity(p=1.0), 50))


def test_one_draw_for_all_samples_whatever_their_batch() -> None:
    together = views(InputDiversity(), 30)
    for view in together:
        assert len({tuple(box) for box in boxes(view)}) == 1
    rng = Rng(0, [4])
    alone = [InputDiversity()(X[4:5], rng) for _ in range(30)]
    assert all(torch.equal(one[4:5], other) for one, other in zip(together, alone, strict=True))
    other = views(InputDiversity(), 30, seed=1)
    assert any(one.shape != two.shape or not torch.equal(one, two) for one, two in zip(together, other, strict=True))


@pytest.mark.parametrize(
    "diversity",
    [
        InputDiversity(p=1.0, per_sample=True),
        InputDiversity(per_sample=True, ratio=0.7),
        InputDiversity(per_sample=True, resize_back=True, mode="bilinear", ratio=1.4),
    ],
)
def test_draws_of_each_sample(diversity: InputDiversity) -> None:
    for number, view in enumerate(views(diversity, 20)):
        rng = Rng(0, [4])
        alone = [diversity(X[4:5], rng) for _ in range(number + 1)][-1]
        assert torch.equal(view[4:5], alone)
    if diversity.p < 1:
        left = torch.stack([(view == X).flatten(1).all(1) for view in views(diversity, 100)])
        assert float(left.float().mean()) == pytest.approx(0.5, abs=0.08)
        assert (left.any(1) & ~left.all(1)).any()  # not all samples of a step at once


@pytest.mark.parametrize(
    ("diversity", "side"),
    [
        (InputDiversity(p=1.0), 22),
        (InputDiversity(p=1.0, ratio=1.5), 30),
        (InputDiversity(p=1.0, ratio=0.9), 20),
        (InputDiversity(p=1.0, resize_back=True), 20),
    ],
)
def test_what_the_model_sees(diversity: InputDiversity, side: int) -> None:
    for dtype in (torch.float32, torch.float64):
        (view,) = views(diversity, 1, X.to(dtype))
        assert view.shape == (6, 3, side, side) and view.dtype == dtype


def test_padding_is_the_middle_of_the_bounds_or_zero() -> None:
    rng = Rng(0, range(6))
    for padding, bounds, fill in (("grey", (0.0, 1.0), 0.5), ("grey", (-2.0, 3.0), 0.5), ("zero", (-2.0, 3.0), 0.0)):
        diversity = InputDiversity(p=1.0, padding=padding)  # type: ignore[arg-type]
        assert (diversity(X, rng, bounds)[:, :, -1] == fill).all()
    with pytest.raises(InputError, match=r"padding inside the bounds \(1.0, 2.0\), got 0.0; set padding='grey'"):
        InputDiversity(padding="zero")(X, rng, (1.0, 2.0))


def test_images_that_are_not_square_keep_their_proportions() -> None:
    x = torch.rand(1, 1, 20, 40)
    for view in views(InputDiversity(p=1.0, ratio=1.5), 50, x):
        assert view.shape == (1, 1, 30, 60)
        _, _, height, width = boxes(view)[0]
        assert abs(width - 2 * height) <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"p": -0.1}, "probability p from 0 to 1, got -0.1"),
        ({"p": 1.5}, "got 1.5"),
        ({"p": float("nan")}, "got nan"),
        ({"ratio": 1.0}, "ratio > 0 other than 1, got 1.0"),
        ({"ratio": 0.0}, "got 0.0"),
        ({"ratio": float("inf")}, "got inf"),
        ({"mode": "cubic"}, "nearest or bilinear, got 'cubic'"),
        ({"padding": "black"}, "grey or zero, got 'black'"),
        ({"per_sample": True}, "samples of one size .*set resize_back=True"),
    ],
)
def test_bad_input_is_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        InputDiversity(**options)  # type: ignore[arg-type]


def test_images_that_cannot_be_resized_are_named() -> None:
    with pytest.raises(InputError, match=r"images \(N, C, H, W\) to resize, got \(6, 5\)"):
        views(InputDiversity(p=1.0), 1, torch.rand(6, 5))
    with pytest.warns(UserWarning, match="images of 8x8 are too small for a ratio of 1.104"):
        (view,) = views(InputDiversity(p=1.0), 1, torch.rand(2, 1, 8, 8))
    assert view.shape == (2, 1, 8, 8)


def test_pgd_with_diversity_is_di2_fgsm_from_a_random_start() -> None:
    """Of the host's own attack it takes a parameter; each restart draws anew."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    target, y = robplug.target(model), model(X).argmax(1)
    options = {"steps": 8, "step_size": 0.02, "random_start": True, "draws": 2}

    def attacked(attack: Attack, seed: int = 0) -> Tensor:
        return attack.run(target, X, y, robplug.ThreatModel("linf", 0.1), Rng(seed, range(6))).x_adv

    pgd = robplug.attack("robplug/pgd", transform=InputDiversity(), early_stop=False, **options)
    assert torch.equal(attacked(pgd), attacked(robplug.attack("di2/di2-fgsm", **options)))
    plain = robplug.attack("robplug/pgd", early_stop=False, **{**options, "draws": 1})
    assert not torch.equal(attacked(pgd), attacked(plain))
    restarted = robplug.attack("robplug/pgd", transform=InputDiversity(), restarts=3, **options)
    assert torch.equal(attacked(restarted), attacked(restarted))
    assert not torch.equal(attacked(restarted), attacked(restarted, seed=1))
