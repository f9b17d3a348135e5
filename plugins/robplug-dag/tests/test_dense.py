"""Algorithm 1 against closed forms, its own definition in a plain loop, and what it refuses."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robplug.errors import InputError
from robplug_dag import dag

RULES = ("label", "goal")


class Centred(nn.Module):
    """So that no class is favoured by all images."""

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5


def network(kernel: int = 3) -> nn.Module:
    """Returns a small smooth network of four classes on (N, 3, H, W), in float64."""
    first, last = (nn.Conv2d(*sides, kernel, padding="same", bias=False) for sides in ((3, 16), (16, 4)))
    return nn.Sequential(Centred(), first, nn.Tanh(), last).double().requires_grad_(False)


def scene(model: nn.Module, count: int = 3, side: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Returns images, the model's predictions as labels of a fifth of the pixels below the first row, random goals."""
    x = torch.rand(count, 3, side, side + 1, dtype=torch.float64)
    labels = model(x).argmax(1)
    goals = (labels + torch.randint(1, 4, labels.shape)) % 4
    labels[torch.rand(labels.shape) > 0.2] = -1
    labels[:, 0] = -1
    return x, labels, goals


def by_hand(
    model: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, goals: Tensor, gamma: float, steps: int, rule: str
) -> tuple[Tensor, list[int]]:
    """Algorithm 1 on one image, word by word; returns r and the sizes of the active sets."""
    r, counts = torch.zeros_like(x), []
    for _ in range(steps):
        image = (x + r).clamp(0, 1).requires_grad_()
        f = model(image[None])[0]
        predicted = f.argmax(0)
        active = (labels >= 0) & ((predicted == labels) if rule == "label" else (predicted != goals))
        counts.append(int(active.sum()))
        if not counts[-1]:
            break
        rows, columns = active.nonzero(as_tuple=True)
        loss = (f[goals[active], rows, columns] - f[labels[active], rows, columns]).sum()
        (r_m,) = torch.autograd.grad(loss, image)
        r = r + gamma / r_m.abs().max() * r_m
    return r, counts


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_is_algorithm_1_on_each_image(rule: Any) -> None:
    """Images leave at different times, and none of this shows."""
    model = network()
    x, labels, goals = scene(model)
    gamma, steps = 0.02, 20
    x_adv, record = dag(model, x, labels, goals, gamma=gamma, steps=steps, rule=rule)
    for n in range(len(x)):
        r, counts = by_hand(model, x[n], labels[n], goals[n], gamma, steps, rule)
        torch.testing.assert_close(record.r[n], r, rtol=1e-9, atol=1e-12)
        assert record.active[n].tolist() == counts + [counts[-1]] * (steps - len(counts))
        converged = counts[-1] == 0
        assert record.status[n] == ("converged" if converged else "steps used up")
        assert record.iterations[n] == len(counts) - converged
        assert torch.equal(x_adv[n], (x[n] + record.r[n]).clamp(0, 1))
    assert "converged" in record.status and len(set(record.iterations.tolist())) > 1


@pytest.mark.parametrize("rule", RULES)
def test_after_convergence_the_rule_holds_for_x_adv(rule: Any) -> None:
    model = network()
    x, labels, goals = scene(model)
    x_adv, record = dag(model, x, labels, goals, gamma=0.02, rule=rule)
    predicted = model(x_adv).argmax(1)
    fine = (predicted != labels) if rule == "label" else (predicted == goals)
    done = torch.tensor([status == "converged" for status in record.status])
    assert done.any() and bool((fine | (labels < 0))[done].all())


def test_on_a_linear_scorer_each_step_is_the_difference_of_two_weights() -> None:
    """r = gamma * m * (w_goal - w_label) / max|w_goal - w_label|."""
    weights = torch.randn(3, 5, dtype=torch.float64)
    scores = lambda x: (x @ weights.T)[:, None]  # noqa: E731
    x = torch.full((3, 5), 0.5, dtype=torch.float64)
    labels = scores(x).argmax(2)
    goals = (labels + torch.tensor([[1], [2], [1]])) % 3
    x_adv, record = dag(scores, x, labels, goals, gamma=1e-3, steps=7, rule="goal")
    towards = weights[goals[:, 0]] - weights[labels[:, 0]]
    expected = 1e-3 * record.iterations[:, None].double() * towards / towards.abs().amax(1, keepdim=True)
    torch.testing.assert_close(record.r, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(x_adv, x + expected, rtol=1e-12, atol=0)
    assert record.iterations.max() == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_value_moves_further_than_gamma_a_step(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    x, labels, goals = scene(network())
    for steps in (1, 5, 20):
        _, record = dag(model, x.to(dtype), labels, goals, gamma=0.01, steps=steps, rule="goal")
        bound = 0.01 * record.iterations.double() * (1 + steps * torch.finfo(record.r.dtype).eps)
        assert (record.r.flatten(1).abs().amax(1) <= bound).all()
        if steps == 1:  # and in the first step one goes as far
            torch.testing.assert_close(record.r.flatten(1).abs().amax(1), torch.full((3,), 0.01).to(record.r))


def test_a_network_of_single_pixels_leaves_all_but_active_pixels_alone() -> None:
    model = network(kernel=1)
    x, labels, goals = scene(model)
    labels[:, :, 3:] = -1
    x_adv, record = dag(model, x, labels, goals, gamma=0.01, steps=3)
    still = (labels < 0)[:, None].expand_as(x)
    assert not record.r[still].any() and torch.equal(x_adv[still], x[still])
    assert record.r[:, :, 1:, :3].any()
    _, first = dag(model, x, labels, goals, gamma=0.01, steps=1)
    assert torch.equal(first.r.ne(0).any(1), labels >= 0)


def test_an_empty_active_set_moves_nothing() -> None:
    """Labels that are not predicted: Algorithm 1 has nothing to do, and takes no step."""
    model = network()
    x, labels, _ = scene(model)
    wrong, goals = (labels + 1) % 4, (labels + 2) % 4
    x_adv, record = dag(model, x, wrong.where(labels >= 0, -1), goals)
    assert not record.r.any() and torch.equal(x_adv, x)
    assert record.status == ("converged",) * 3 and not record.iterations.any() and not record.active.any()


@pytest.mark.parametrize("rule", RULES)
def test_an_image_without_targets_comes_back_as_it_was(rule: Any) -> None:
    model = network()
    x, labels, goals = scene(model)
    labels[1] = -1
    calls: list[int] = []

    def counted(images: Tensor) -> Tensor:
        calls.append(len(images))
        return model(images)

    x_adv, record = dag(counted, x, labels, goals, gamma=0.01, rule=rule)
    assert torch.equal(x_adv[1], x[1]) and record.status[1] == "no targets" and record.iterations[1] == 0
    assert max(calls) == 2
    alone, other = dag(model, x[:1], labels[:1], goals[:1], gamma=0.01, rule=rule)
    torch.testing.assert_close(alone, x_adv[:1], rtol=1e-9, atol=1e-12)
    assert other.status == record.status[:1]
    everything = dag(counted, x, torch.full_like(labels, -1), goals)
    assert torch.equal(everything[0], x) and everything[1].status == ("no targets",) * 3


def test_a_gradient_of_zero_stops_the_image_and_no_other() -> None:
    """A dead network has a constant prediction: the paper would divide by zero."""
    model = network()
    x, labels, goals = scene(model, count=2)

    def scores(images: Tensor) -> Tensor:
        logits = model(images)
        dead = (images.detach() - x[0]).abs().flatten(1).amax(1) == 0
        return torch.where(dead[:, None, None, None], logits.detach(), logits)

    x_adv, record = dag(scores, x, labels, goals, gamma=0.01, steps=30)
    assert record.status[0] == "no gradient" and torch.equal(x_adv[0], x[0]) and record.iterations[0] == 0
    assert record.active[0].tolist() == [int((labels[0] >= 0).sum())] * 30
    assert record.status[1] != "no gradient" and record.iterations[1] > 0


def test_proposals_are_targets_as_pixels_are() -> None:
    """Logits (N, R, C), padded with label -1, are those of (N, C, R, 1)."""
    model = network()
    x, labels, goals = scene(model)
    flat, wanted = labels.flatten(1), goals.flatten(1)
    as_proposals = dag(lambda images: model(images).flatten(2).mT, x, flat, wanted, gamma=0.01)
    as_pixels = dag(model, x, labels, goals, gamma=0.01)
    torch.testing.assert_close(as_proposals[0], as_pixels[0], rtol=1e-9, atol=1e-12)
    assert torch.equal(as_proposals[1].active, as_pixels[1].active)


def test_bounds_scale_everything() -> None:
    model = network()
    x, labels, goals = scene(model)
    x_adv, record = dag(model, x, labels, goals, gamma=0.01)
    wide, wide_record = dag(lambda images: model(images / 255), 255 * x, labels, goals, gamma=2.55, bounds=(0, 255))
    torch.testing.assert_close(wide, 255 * x_adv, rtol=1e-9, atol=1e-9)
    assert torch.equal(record.active, wide_record.active)


def test_x_adv_is_inside_the_bounds_and_is_what_the_network_saw_last() -> None:
    model = network()
    x, _, goals = scene(model)
    x = x.round()  # every value is at a bound
    seen: list[Tensor] = []

    def watched(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return model(images)

    labels = model(x[:1]).argmax(1)
    labels[:, 1:] = -1
    x_adv, record = dag(watched, x[:1], labels, goals[:1], gamma=0.02)
    assert record.status == ("converged",) and x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(seen[-1], x_adv) and not torch.equal(record.r, x_adv - x[:1])


def test_inputs_are_not_written_and_nothing_is_attached() -> None:
    model = network()
    x, labels, goals = scene(model)
    x.requires_grad_()
    copies = [tensor.detach().clone() for tensor in (x, labels, goals)]
    with torch.no_grad():
        x_adv, record = dag(model, x, labels.int(), goals.short(), gamma=0.01, steps=3)
    assert not x_adv.requires_grad and not record.r.requires_grad and x.grad is None
    assert all(torch.equal(one, other) for one, other in zip((x, labels, goals), copies, strict=True))


def test_no_images_are_no_error() -> None:
    empty = torch.zeros(0, 3, 4, 4)
    x_adv, record = dag(network(), empty, torch.zeros(0, 4, 4).long(), torch.zeros(0, 4, 4).long())
    assert x_adv.shape == empty.shape and record.status == ()


X, NONE = torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)


def broken(place: str) -> Callable[[Tensor], Tensor]:
    """Returns scores whose logits or gradients are not finite for the second image, from the third step on."""
    weight = torch.randn(3, 3, 3, 3)
    steps = iter(range(1000))

    def scores(images: Tensor) -> Tensor:
        logits = F.conv2d(images, weight, padding=1)
        if next(steps) < 2:
            return logits
        if place == "logits":
            return logits.index_fill(0, torch.tensor(1), torch.nan)
        images.register_hook(lambda grad: grad.index_fill(0, torch.tensor(1), torch.nan))
        return logits

    return scores


@pytest.mark.parametrize("place", ["logits", "gradient"])
def test_a_nan_names_its_image_and_step(place: str) -> None:
    with pytest.raises(InputError, match=rf"expected finite {place}, got nan or inf for image 1 in step 2"):
        dag(broken(place), X, NONE, NONE + 1, gamma=1e-6, rule="goal")


def scores(images: Tensor) -> Tensor:
    return images


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dag(scores, X, NONE[:, :2], NONE), r"goals of integers, of shape \(2, 2, 4\), got \(2, 4, 4\)"),
        (lambda: dag(scores, X, NONE, NONE + 1.0), "goals of integers.*torch.float32"),
        (lambda: dag(lambda x: x[:, :, ::2, ::2], X, NONE, NONE + 1), "lower resolution, upsample them as the model"),
        (lambda: dag(scores, X, NONE + 255, NONE), r"below the 3 classes of the logits, got 255; .*leave_out"),
        (lambda: dag(scores, X, NONE, NONE + 3), "goals below the 3 classes of the logits, got 3"),
        (lambda: dag(lambda x: x[:, :1], X, NONE, NONE + 1), "at least two classes, got 1"),
        (lambda: dag(lambda x: x.detach(), X, NONE, NONE + 1), "depend on the images by autograd, got none"),
        (lambda: dag(scores, X.long(), NONE, NONE + 1), "of a floating dtype, got .* torch.int64"),
        (lambda: dag(scores, X * 255, NONE, NONE + 1), r"images inside \(0.0, 1.0\), got values from"),
        (lambda: dag(scores, X * torch.nan, NONE, NONE + 1), "got values from nan to nan"),
        (lambda: dag(scores, X, NONE, NONE + 1, gamma=0.0), "gamma > 0, got 0.0"),
        (lambda: dag(scores, X, NONE, NONE + 1, steps=0), "steps >= 1, got 0"),
        (lambda: dag(scores, X, NONE, NONE + 1, rule="both"), "'label' or 'goal', got 'both'"),  # type: ignore[arg-type]
        (lambda: dag(scores, X, NONE, NONE + 1, bounds=(1, 0)), r"low < high, got \(1, 0\)"),
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("name", ["dense", "goals", "measures", "shapes"])
def test_examples(name: str) -> None:
    module = importlib.import_module(f"robplug_dag.{name}")
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert found.attempted and not found.failed
