"""The operators against plain loops and closed forms, and what they refuse."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from robplug.testing.kernels import check_refused, laid_out
from robplug_dag import dense_adversary_grad, normalised_step
from robplug_dag.kernels import ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
X = torch.rand(2, 3, 4, 5)
LOGITS = torch.randn(2, 4, 3, 5)
LABELS = torch.zeros(2, 3, 5, dtype=torch.int64)


def by_hand(logits: Tensor, labels: Tensor, goals: Tensor, rule: str) -> tuple[Tensor, list[int]]:
    """Equation 2.2's upstream gradient and the size of the active set, one target at a time."""
    axis = 1 if logits.dim() == 4 else 2
    rows = logits.movedim(axis, -1)
    gradient, counts = torch.zeros_like(rows), [0] * len(logits)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in labels.shape)).tolist():
        scores = rows[tuple(place)].tolist()
        label, goal = int(labels[tuple(place)]), int(goals[tuple(place)])
        classes = range(len(scores))
        if label not in classes or goal not in classes or label == goal:
            continue
        predicted = scores.index(max(scores))
        if (predicted == label) if rule == "label" else (predicted != goal):
            gradient[tuple(place)][goal] += 1
            gradient[tuple(place)][label] -= 1
            counts[place[0]] += 1
    return gradient.movedim(-1, axis), counts


@pytest.mark.parametrize("rule", ["label", "goal"])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (2, 2, 3, 3), (1, 12, 1, 6), (3, 11, 6), (1, 1, 2), (0, 3, 2, 2)])
def test_gradient_and_count_are_those_of_a_plain_loop(shape: tuple[int, ...], ties: bool, rule: Any) -> None:
    logits = torch.randn(shape)
    logits = logits.round() if ties else logits
    rest = list(shape)
    classes = rest.pop(1 if len(shape) == 4 else 2)
    labels, goals = (torch.randint(-2, classes + 2, rest) for _ in range(2))
    gradient, counts = dense_adversary_grad(logits, labels, goals, rule)
    expected, expected_counts = by_hand(logits, labels, goals, rule)
    assert torch.equal(gradient, expected) and counts.tolist() == expected_counts


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_and_dtype_change_nothing(dtype: torch.dtype, layout: str) -> None:
    logits = laid_out(LOGITS.round().to(dtype), layout)
    labels = LOGITS.argmax(1)
    gradient, counts = dense_adversary_grad(logits, labels, (labels + 1) % 4)
    expected, expected_counts = by_hand(LOGITS.round(), labels, (labels + 1) % 4, "label")
    assert gradient.dtype == dtype and torch.equal(gradient.float(), expected) and counts.tolist() == expected_counts


def test_the_gradient_is_that_of_the_sum_over_active_targets() -> None:
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, (2, 3, 5))
    goals = (labels + torch.randint(1, 4, labels.shape)) % 4
    active = logits.argmax(1) == labels
    chosen = logits.gather(1, goals[:, None]) - logits.gather(1, labels[:, None])
    (expected,) = torch.autograd.grad(chosen[:, 0][active].sum(), logits)
    gradient, counts = dense_adversary_grad(logits, labels, goals)
    assert torch.equal(gradient, expected) and torch.equal(counts, active.sum((1, 2)))
    assert not gradient.requires_grad


def test_equal_logits_are_predicted_as_the_first_class() -> None:
    logits = torch.zeros(1, 3, 3)
    labels, goals = torch.tensor([[0, 1, 2]]), torch.tensor([[1, 0, 0]])
    assert dense_adversary_grad(logits, labels, goals, "label")[1].tolist() == [1]
    assert dense_adversary_grad(logits, labels, goals, "goal")[1].tolist() == [1]


def test_a_step_is_its_definition() -> None:
    gradient, r, x = torch.randn(3, 2, 4, 5).double(), torch.randn(3, 2, 4, 5).double(), torch.rand(3, 2, 4, 5).double()
    moved, image, size = normalised_step(gradient, r, x, 0.25, 0.0, 1.0)
    for n in range(3):
        largest = gradient[n].abs().max()
        expected = r[n] + 0.25 * gradient[n] / largest
        torch.testing.assert_close(moved[n], expected, rtol=1e-14, atol=1e-15)
        assert torch.equal(image[n], (x[n] + moved[n]).clamp(0, 1)) and size[n] == largest


def test_a_step_is_never_longer_than_gamma_and_that_long_somewhere() -> None:
    for power in (-44, -38, -10, 0, 20, 37):
        gradient = torch.randn(50, 30) * 10.0**power
        moved, _, _ = normalised_step(gradient, torch.zeros(50, 30), torch.zeros(50, 30), 0.3, -1.0, 1.0)
        assert torch.equal(moved.abs().amax(1), torch.full((50,), 0.3))


def test_a_gradient_of_zero_moves_nothing_and_says_so() -> None:
    gradient, r = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    gradient[0] = 0
    moved, image, size = normalised_step(gradient, r, X, 0.1, 0.0, 1.0)
    assert torch.equal(moved[0], r[0]) and torch.equal(image[0], (X[0] + r[0]).clamp(0, 1)) and size[0] == 0
    assert not torch.equal(moved[1], r[1])


def test_r_runs_on_where_the_image_is_cut() -> None:
    r, x = torch.zeros(1, 2), torch.tensor([[0.95, 0.5]])
    for count in range(1, 4):
        r, image, _ = normalised_step(torch.ones(1, 2), r, x, 0.1, 0.0, 1.0)
        torch.testing.assert_close(r, torch.full((1, 2), 0.1 * count))
        torch.testing.assert_close(image, torch.tensor([[1.0, 0.5 + 0.1 * count]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_sums_in_float32_and_rounds_the_image_once(dtype: torch.dtype) -> None:
    gradient, x = (torch.rand(2, 3, 4, 5).to(dtype) for _ in range(2))
    r, exact = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for _ in range(50):
        r, image, _ = normalised_step(gradient, r, x, 1e-3, 0.0, 1.0)
        exact, _, _ = normalised_step(gradient.double(), exact, x.double(), 1e-3, 0.0, 1.0)
    torch.testing.assert_close(r.double(), exact, rtol=1e-5, atol=0)
    off = (image.double() - (x.double() + exact).clamp(0, 1)).abs()
    assert image.dtype == dtype and off.max() <= torch.finfo(dtype).eps / 2 * 1.01


def test_no_input_is_written() -> None:
    logits, r, x = LOGITS.clone(), torch.zeros_like(X), X.clone()
    labels = logits.argmax(1)
    copies = [tensor.clone() for tensor in (logits, labels, r, x)]
    dense_adversary_grad(logits, labels, LABELS)
    normalised_step(x, r, x, 0.1, 0.0, 1.0)
    assert all(torch.equal(one, other) for one, other in zip((logits, labels, r, x), copies, strict=True))


def test_opcheck() -> None:
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    last, columns = LOGITS.to(memory_format=torch.channels_last), LOGITS.mT.contiguous().mT
    for logits in (LOGITS, last, columns, torch.randn(2, 6, 11), torch.randn(2, 11, 6).mT):
        rest = logits.shape[:1] + logits.shape[2:] if logits.dim() == 4 else logits.shape[:2]
        labels = torch.zeros(rest, dtype=torch.int64)
        torch.library.opcheck(ops._dense_adversary_grad, (logits, labels, labels + 1, True), test_utils=utils)
    for x in (X, X.to(memory_format=torch.channels_last), X.mT.contiguous().mT, X.bfloat16()):
        args = (torch.rand_like(x), torch.zeros_like(X), x, 0.1, 0.0, 1.0)
        torch.library.opcheck(ops._normalised_step, args, test_utils=utils)


R = torch.zeros_like(X)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda: dense_adversary_grad(LOGITS.long(), LABELS, LABELS),
            TypeError,
            r"got torch.int64; .*logits.float\(\)",
        ),
        (lambda: dense_adversary_grad(LOGITS[0, 0], LABELS, LABELS), ValueError, r"or \(N, R, C\), got \(3, 5\)"),
        (lambda: dense_adversary_grad(LOGITS[:, :1], LABELS, LABELS), ValueError, "at least two classes, got 1"),
        (lambda: dense_adversary_grad(LOGITS, LABELS.int(), LABELS), TypeError, r"got torch.int32; .*labels.long\(\)"),
        (
            lambda: dense_adversary_grad(LOGITS, LABELS, LABELS[:, :2]),
            ValueError,
            r"goals \(2, 3, 5\) for logits \(2, 4, 3, 5\), got \(2, 2, 5\); .*lower resolution",
        ),
        (lambda: dense_adversary_grad(LOGITS, LABELS, LABELS, "both"), ValueError, "'label' or 'goal', got 'both'"),  # type: ignore[arg-type]
        (lambda: normalised_step(X.long(), R, X.long(), 0.1, 0, 1), TypeError, "expected x of float16"),
        (lambda: normalised_step(X[0, 0, 0], R, X[0, 0, 0], 0.1, 0, 1), ValueError, r"\(N, ...\), got \(5,\)"),
        (lambda: normalised_step(X[:1], R, X, 0.1, 0, 1), ValueError, r"gradient \(2, 3, 4, 5\).*got \(1, 3, 4, 5\)"),
        (lambda: normalised_step(X, R.half(), X, 0.1, 0, 1), ValueError, "r .*torch.float32.*got .*torch.float16"),
        (lambda: normalised_step(X, R, X, 0.0, 0, 1), ValueError, "gamma > 0, got 0.0"),
        (lambda: normalised_step(X, R, X, float("nan"), 0, 1), ValueError, "gamma > 0, got nan"),
        (lambda: normalised_step(X, R, X, 0.1, 1, 1), ValueError, "low < high, got 1.0 and 1.0"),
    ],
)
def test_bad_input_is_refused_with_value_and_remedy(call: Any, kind: type[Exception], words: str) -> None:
    check_refused(call, kind, words)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, robplug_dag, robplug_dag.plugin; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
