"""Labels and goals: what is left out, permutations without fixed point, shapes, and what is refused."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import pytest
import torch

from robplug.errors import InputError
from robplug.rng import Rng
from robplug_dag import (
    dag,
    fooling_start,
    label_map,
    leave_out,
    permuted_goals,
    random_goals,
    random_permutations,
    strongest_rivals,
    text_mask,
)

LABELS = torch.tensor([[[0, 1, 2], [2, -1, 1]], [[2, 2, 0], [1, 1, -1]]])


def test_what_is_left_out_has_no_goal() -> None:
    labels = leave_out(torch.tensor([[0, 4, 255, 7]], dtype=torch.uint8), 0, 255)
    assert labels.tolist() == [[-1, 4, -1, 7]] and labels.dtype == torch.int64
    assert random_goals(labels, 8, Rng(0, [0]))[0].ge(0).tolist() == [False, True, False, True]


def test_random_permutations_are_uniform_among_those_without_fixed_point() -> None:
    """Nine of four classes; each is drawn as often as the others, within five standard errors."""
    draws = 9000
    found = Counter(map(tuple, random_permutations(4, Rng(1, range(draws))).tolist()))
    without = {p for p in permutations(range(4)) if all(k != v for k, v in enumerate(p))}
    assert set(found) == without and len(without) == 9
    assert all(abs(count - 1000) < 5 * (draws * 8 / 81) ** 0.5 for count in found.values())


@pytest.mark.parametrize("classes", [2, 3, 21, 150])
def test_no_class_stays(classes: int) -> None:
    found = random_permutations(classes, Rng(0, range(40)))
    assert torch.equal(found.sort(1).values, torch.arange(classes).expand(40, -1))
    assert not (found == torch.arange(classes)).any()


def test_an_images_draws_do_not_depend_on_its_neighbours() -> None:
    """Neither the permutation nor what is drawn afterwards."""
    many, one = Rng(3, range(20)), Rng(3, [11])
    assert torch.equal(random_permutations(5, many)[11:12], random_permutations(5, one))
    like = torch.empty(())
    assert torch.equal(many.uniform((3,), like=like)[11:12], one.uniform((3,), like=like))
    assert torch.equal(random_permutations(5, Rng(3, [11])), random_permutations(5, Rng(3, [11])))
    assert not torch.equal(random_permutations(21, Rng(3, [11])), random_permutations(21, Rng(4, [11])))


def test_goals_are_the_permutation_of_the_labels() -> None:
    each = torch.tensor([[1, 2, 0], [2, 0, 1]])
    expected = [[[1, 2, 0], [0, -1, 2]], [[1, 1, 2], [0, 0, -1]]]
    assert permuted_goals(LABELS, each).tolist() == expected
    assert torch.equal(permuted_goals(LABELS, each[0])[0], torch.tensor(expected[0]))
    assert torch.equal(permuted_goals(LABELS.flatten(1), each).view_as(LABELS), torch.tensor(expected))
    drawn = random_permutations(3, Rng(5, range(2)))
    assert torch.equal(random_goals(LABELS, 3, Rng(5, range(2))), permuted_goals(LABELS, drawn))


def test_a_class_that_nothing_has_may_stay() -> None:
    labels = leave_out(LABELS, 0)
    assert permuted_goals(labels, torch.tensor([0, 2, 1])).unique().tolist() == [-1, 1, 2]


def test_text_becomes_letters_in_the_middle() -> None:
    mask = text_mask("I", 32, 64)
    rows, columns = mask.nonzero(as_tuple=True)
    assert rows.min() <= 1 and rows.max() >= 30
    assert abs((columns.min() + columns.max()).item() / 2 - 31.5) <= 1.5
    inner = mask[4:28, int(columns.min()) + 1 : int(columns.max())]
    assert inner.all()  # one stroke
    wide = text_mask("WWWWWWWW", 32, 64)
    assert wide.any(0).sum() > 60 and wide.any(1).sum() < 20
    assert not torch.equal(text_mask("2017", 32, 64), text_mask("ICCV", 32, 64))


def test_a_map_has_one_class_inside_and_one_outside() -> None:
    mask = torch.eye(3) > 0
    assert label_map(mask, 5, 2).tolist() == [[5, 2, 2], [2, 5, 2], [2, 2, 5]]


def test_rivals_are_the_best_of_the_other_classes() -> None:
    logits = torch.randn(2, 5, 3, 4)
    goals = torch.randint(5, (2, 3, 4))
    rivals = strongest_rivals(logits, goals)
    order = logits.argsort(1, descending=True)
    assert torch.equal(rivals, torch.where(order[:, 0] == goals, order[:, 1], order[:, 0]))


def test_a_fooling_image_shows_the_shape_everywhere() -> None:
    """Of a network that sees single pixels, so that every goal can be reached."""
    net = torch.nn.Conv2d(3, 3, 1, bias=False).requires_grad_(False)
    net.weight.copy_(torch.eye(3)[..., None, None])
    goals = label_map(text_mask("17", 12, 24), inside=1, outside=2).expand(2, -1, -1)
    x, labels = fooling_start(net, goals, Rng(0, range(2)))
    assert (labels != goals).all() and x.shape == (2, 3, 12, 24) and 0 <= x.min() and x.max() <= 1
    x_adv, record = dag(net, x, labels, goals, gamma=0.05, rule="goal")
    assert record.status == ("converged",) * 2 and torch.equal(net(x_adv).argmax(1), goals)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: random_goals(LABELS, 1, Rng(0, range(2))), "two or more classes, got 1; .*fixed point"),
        (lambda: random_goals(LABELS, 3, Rng(0, range(3))), "labels of 3 images, one for each stream, got 2"),
        (lambda: random_goals(LABELS, 2, Rng(0, range(2))), r"labels below 2.*got 2; leave_out\(labels, 255\)"),
        (lambda: permuted_goals(LABELS, torch.tensor([1, 0, 2])), "moves every label, got 2 -> 2"),
        (
            lambda: permuted_goals(LABELS, torch.tensor([1, 0, 1])),
            r"of the classes 0 to 2.*got \[1, 0, 1\]",
        ),
        (lambda: permuted_goals(LABELS, torch.tensor([[1, 2, 0]] * 3)), "one for each of 2 images"),
        (lambda: text_mask(" ", 8, 8), "visible letters, got ' '"),
        (lambda: text_mask("A", 0, 8), r"height and width >= 1, got \(0, 8\)"),
        (lambda: label_map(torch.ones(2, 2), 1), r"bool, got \(2, 2\) of torch.float32; compare it"),
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
