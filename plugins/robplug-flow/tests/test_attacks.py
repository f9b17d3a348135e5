"""Flow attacks against brute force on linear models, and on the digits network.

On a linear model the loss is a sum over pixels, each a bilinear function of its own displacement. Within a pixel such a
function has its extremes at the corners of the cells: nine displacements per pixel are all there is to try.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.errors import InputError, ThreatError
from robplug.loop import margin
from robplug.rng import Rng
from robplug.testing.trials import NoGradients
from robplug.types import Attack, Perturbed, ThreatModel
from robplug_flow import flow_smoothness, warp
from robplug_flow.attack import MultiStep, SingleStep
from robplug_flow.gradient_free import GradientFree
from robplug_flow.norm import FLOW
from robplug_flow.stadv import StAdv

QUICK: list[Attack] = [SingleStep(), MultiStep(steps=5), StAdv(steps=30), GradientFree(queries=101)]


class Linear(nn.Module):
    """Two classes; class 1 wins where the weighted sum of pixels exceeds the threshold."""

    def __init__(self, weight: Tensor, threshold: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.weight).flatten(1).sum(1) - self.threshold
        return torch.stack([-score / 2, score / 2], dim=1)


def best_score(x: Tensor, weight: Tensor, eps: float) -> float:
    """Returns the largest weighted sum that a flow within eps <= 1 can reach, by brute force."""
    corners = [-eps, 0.0, eps]
    flows = [torch.tensor([r, c]).view(1, 2, 1, 1).expand(1, 2, *x.shape[2:]) for r in corners for c in corners]
    gains = torch.stack([(warp(x, flow.contiguous()) * weight).sum((0, 1)) for flow in flows])
    return float(gains.amax(0).sum())


def ramp() -> Tensor:
    """An image that rises along rows and columns, so that the gradient at no flow points at the optimum."""
    rows, cols = torch.meshgrid(torch.arange(6.0), torch.arange(5.0), indexing="ij")
    return ((rows * 2 + cols) / 14)[None, None]


def attack_on(
    module: nn.Module, attack: Attack, x: Tensor, y: Tensor, eps: float | None, norm: str = "flow"
) -> Perturbed:
    return attack.run(robplug.target(module), x, y, ThreatModel(norm, eps), Rng(0, range(len(x))))


@pytest.mark.parametrize(
    ("attack", "share"),
    [
        (SingleStep(), 1.0),
        (MultiStep(restarts=1), 1.0),
        (MultiStep(random_start=True, restarts=1), 1.0),
        (GradientFree(queries=4001), 0.9),
    ],
)
def test_strength_on_a_ramp_is_that_of_brute_force(attack: Attack, share: float) -> None:
    x, eps = ramp(), 0.4
    torch.manual_seed(3)
    weight = torch.rand(6, 5) + 0.1
    weight[:-1, :-1:2] *= -1  # at the last row and column a flow backwards is not seen from no flow
    clean, best = float((x * weight).sum()), best_score(x, weight, eps)
    for part, broken in ((0.97 * share, True), (1.03, False)):
        model = Linear(weight, clean + part * (best - clean))
        found = attack_on(model, attack, x, torch.tensor([0]), eps)
        assert bool(model(found.x_adv).argmax(1) == 1) is broken
        assert float(FLOW.distance(x, found.x_adv, found.witness)) <= FLOW.allowed(eps, x.numel(), (0.0, 1.0))


def test_single_step_is_the_sign_of_the_forward_differences() -> None:
    torch.manual_seed(0)
    x, weight = torch.rand(1, 2, 4, 5), torch.randn(2, 4, 5)
    found = attack_on(Linear(weight, 100.0), SingleStep(), x, torch.tensor([0]), 0.3)
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    down[:, :, :-1] = x[:, :, 1:] - x[:, :, :-1]
    right[..., :-1] = x[..., 1:] - x[..., :-1]
    slope = torch.stack([(down * weight).sum(1), (right * weight).sum(1)], dim=1)
    torch.testing.assert_close(found.witness, 0.3 * slope.sign())


@pytest.mark.parametrize(("norm", "sides"), [("flow", (1.0, 1.0)), ("flow-normalized", (1.5, 2.0))])
def test_multi_step_is_the_papers_iteration(
    norm: str, sides: tuple[float, float], plain_steps: Callable[..., Tensor]
) -> None:
    """Steps of 1/8: they are exact, so that a flow which comes back to a kink stands on it in any precision."""
    x, weight = torch.rand(3, 2, 4, 5), torch.randn(2, 4, 5)
    model = Linear(weight, 30.0)  # beyond reach, so that all steps are made
    found = attack_on(model, MultiStep(steps=6, restarts=1), x, torch.zeros(3, dtype=torch.int64), 0.75, norm)
    flow = plain_steps(lambda moved: (moved * weight).sum(), x.double(), 0.75, sides, 6)
    assert torch.equal(found.witness.double(), flow)


def digits(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns the shipped network and digits that it classifies correctly."""
    model = robplug.target("robplug/digits-standard").module
    data = robplug.dataset("digits", split="test").head(2 * count)
    with torch.no_grad():
        right = model(data.x).argmax(1) == data.y
    return model, data.x[right][:count], data.y[right][:count]


@torch.no_grad()
def breaks(model: nn.Module, found: Perturbed, y: Tensor) -> Tensor:
    return model(found.x_adv).argmax(1) != y


@pytest.mark.parametrize("eps", [0.2, 0.4])
def test_multi_step_is_never_weaker_than_single_step(eps: float) -> None:
    model, x, y = digits(40)
    single = breaks(model, attack_on(model, SingleStep(), x, y, eps), y)
    for attack in (
        MultiStep(steps=2, step_size=0.01, restarts=1),
        MultiStep(steps=10),
        MultiStep(steps=10, early_stop=False),
    ):
        multi = breaks(model, attack_on(model, attack, x, y, eps), y)
        assert (multi | ~single).all() and single.any() and not single.all()


def test_more_steps_and_random_starts_break_more() -> None:
    model, x, y = digits(100)
    attacks = (SingleStep(), MultiStep(restarts=1), MultiStep(restarts=3))
    counts = [int(breaks(model, attack_on(model, attack, x, y, 0.4), y).sum()) for attack in attacks]
    assert counts[0] < counts[1] < counts[2]


def test_with_a_ladder_a_larger_radius_never_breaks_fewer() -> None:
    model, x, y = digits(40)
    radii = (0.05, 0.1, 0.15, 0.2)
    attack = MultiStep(steps=3, restarts=1, ladder=radii)
    before = torch.zeros(len(x), dtype=torch.bool)
    for eps in radii:
        found = attack_on(model, attack, x, y, eps)
        now = breaks(model, found, y)
        assert (now | ~before).all() and now.sum() > before.sum()
        assert (FLOW.distance(x, found.x_adv, found.witness) <= FLOW.allowed(eps, 64, (0.0, 1.0))).all()
        before = now


def test_a_ladder_keeps_what_a_smaller_radius_broke() -> None:
    """The bright pixel is one column away: a step of two passes over it."""
    x, y = torch.tensor([[[[0.0, 1.0, 0.0, 0.0]]]]), torch.tensor([0])
    model = Linear(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 0.5)
    plain = MultiStep(steps=1, step_size=2.0, restarts=1, early_stop=False)
    laddered = replace(plain, ladder=[1.0])
    broken = [bool(breaks(model, attack_on(model, plain, x, y, eps), y)) for eps in (1.0, 2.0)]
    assert broken == [True, False]
    assert [bool(breaks(model, attack_on(model, laddered, x, y, eps), y)) for eps in (1.0, 2.0)] == [True, True]


def test_on_a_ladder_steps_go_on_where_the_last_radius_ended() -> None:
    """Three columns are one step of two from the first rung; from no flow it is two or, in a single step, five."""
    x, y = torch.tensor([[[[0.0, 0.3, 0.6, 0.9, 0.0, 0.0]]]]), torch.tensor([0])
    model = Linear(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]), 0.8)
    plain = MultiStep(steps=1, step_size=2.0, restarts=1)
    assert not breaks(model, attack_on(model, plain, x, y, 5.0), y)
    found = attack_on(model, replace(plain, ladder=[1.0]), x, y, 5.0)
    assert breaks(model, found, y) and found.witness[0, 1, 0, 0] == 3.0


def test_stadv_finds_that_a_shift_costs_nothing() -> None:
    """Pixel 0 must exceed 0.25, which a flow of 0.25 does; if pixel 1 flows along, over the edge, nothing is rough."""
    x = torch.tensor([[[[0.0, 1.0]]]])
    model = Linear(torch.tensor([[1.0, 0.0]]), 0.25)
    for optimizer in ("sgd", "lbfgs"):
        attack = StAdv(tau=0.1, unit="pixel", kappa=0.05, optimizer=optimizer, steps=60)
        found = attack_on(model, attack, x, torch.tensor([0]), None)
        flow = found.witness[0, 1, 0]
        assert breaks(model, found, torch.tensor([0]))
        assert flow[0] > 0.25 and abs(flow[1] - flow[0]) < 5e-3
        assert found.witness[0, 0].eq(0).all()


class Recorder(nn.Module):
    """Keeps what it is asked about."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.seen = module, []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        return self.module(x)


def last_lead(**options: object) -> float:
    """Returns the lead where stAdv ends; it is v1 - v2 - 0.8, of pixels 1 and 2 of a ramp of four."""
    x, model = torch.arange(4.0).view(1, 1, 1, 4) / 3, Recorder(Linear(torch.tensor([0.0, 3.0, -3.0, 0.0]), -0.2))
    attack_on(model, StAdv(kappa=0.1, optimizer="lbfgs", steps=40, **options), x, torch.tensor([0]), None)
    return float(margin(model.module(model.seen[-1]), torch.tensor([0])))


@pytest.mark.parametrize(("unit", "critical"), [("pixel", 0.5), ("normalized", 0.75)])
def test_stadv_balances_lead_and_roughness(unit: str, critical: float) -> None:
    """Where the lead rises by 1, the flow loss, which has each pair twice, rises by 2 (4/3 as a unit is 1.5 pixels).

    If that is more than is gained, all pixels move alike; if it is less, the pull ends at a lead of kappa.
    """
    assert last_lead(tau=1.2 * critical, unit=unit) == pytest.approx(-0.8, abs=2e-3)
    assert last_lead(tau=0.7 * critical, unit=unit) == pytest.approx(0.1, abs=2e-3)


def test_stadv_with_diagonal_neighbours_has_no_flow_loss_in_one_row() -> None:
    assert last_lead(tau=100.0, neighbours="diagonal") >= 0.1


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_stadv_keeps_the_smoothest_of_all_flows_that_break(optimizer: str) -> None:
    model, x, y = digits(1)
    attack = StAdv(optimizer=optimizer, steps=60)
    flows: list[Tensor] = []

    def spy(flow: Tensor, neighbours: str = "adjacent") -> Tensor:
        flows.append(flow.detach())
        return flow_smoothness(flow, neighbours)

    recorder = Recorder(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robplug_flow.stadv.flow_smoothness", spy)
        found = attack_on(recorder, attack, x, y, None)
    assert found.claim.all()
    tried = flows[::2]  # the second call of each pair is the softened one
    ahead = torch.cat([margin(model(seen), y) for seen in recorder.seen])
    rough = torch.cat([flow_smoothness(flow) for flow in tried])
    kept = flow_smoothness(found.witness * (2 / 7))
    torch.testing.assert_close(kept, rough[ahead > 1e-3].min()[None], rtol=1e-3, atol=0)


def test_stadv_breaks_all_digits_with_smoother_flows_than_multi_step() -> None:
    model, x, y = digits(40)
    smooth = attack_on(model, StAdv(steps=40), x, y, None)
    assert breaks(model, smooth, y).all() and smooth.claim.all()
    signed = attack_on(model, MultiStep(), x, y, 0.6)
    assert flow_smoothness(smooth.witness).mean() < 0.5 * flow_smoothness(signed.witness).mean()
    assert FLOW.distance(x, smooth.x_adv, smooth.witness).isfinite().all()


def test_gradient_free_asks_for_no_gradient_and_counts_its_queries() -> None:
    model, x, y = digits(20)
    blind = NoGradients(model)
    recorder = Recorder(blind)
    target = replace(robplug.target(recorder), offers="scores")
    found = GradientFree(queries=205, population=10).run(target, x, y, ThreatModel("flow", 0.1), Rng(0, range(20)))
    assert not blind.asked
    asked = [len(seen) for seen in recorder.seen]
    assert asked[0] == 20 * 10 and len(asked) <= 21  # one batch a generation
    robust = int((~breaks(model, found, y)).sum())
    assert robust > 0 and asked[-1] == robust  # the last query of those that stand
    assert sum(asked) <= 205 * 20


def test_gradient_free_comes_near_the_gradient_attacks() -> None:
    model, x, y = digits(20)
    free, multi = (breaks(model, attack_on(model, a, x, y, 0.4), y) for a in (GradientFree(queries=400), MultiStep()))
    assert 0.6 * multi.sum() <= free.sum()


def test_gradient_free_with_a_flow_loss_finds_smoother_flows() -> None:
    model, x, y = digits(10)
    plain, smooth = (attack_on(model, GradientFree(queries=401, tau=tau), x, y, 0.2) for tau in (0.0, 10.0))
    assert flow_smoothness(smooth.witness).mean() < 0.75 * flow_smoothness(plain.witness).mean()


@pytest.mark.parametrize("attack", QUICK, ids=lambda attack: type(attack).__name__)
def test_targeted_attacks_reach_their_goals(attack: Attack) -> None:
    model, x, y = digits(40)
    with torch.no_grad():
        goal = model(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    eps = None if isinstance(attack, StAdv) else 0.6
    threat = ThreatModel("flow", eps, targeted=True)
    found = attack.run(robplug.target(model), x, y, threat, Rng(0, range(40)), y_goal=goal)
    with torch.no_grad():
        assert (model(found.x_adv).argmax(1) == goal).float().mean() >= 0.5


@pytest.mark.parametrize("attack", QUICK, ids=lambda attack: type(attack).__name__)
def test_bad_input_is_named(attack: Attack) -> None:
    model, x, y = digits(2)
    eps = None if isinstance(attack, StAdv) else 0.2
    with pytest.raises(InputError, match=r"expected x of a floating-point dtype, got torch.uint8"):
        attack_on(model, attack, (255 * x).to(torch.uint8), y, eps)
    with pytest.raises(InputError, match=r"expected images of shape \(N, C, H, W\), got \(2, 64\)"):
        attack_on(nn.Linear(64, 10), attack, x.flatten(1), y, eps)
    with pytest.raises(ThreatError, match="expected a threat with norm flow or flow-normalized, got 'linf'"):
        attack_on(model, attack, x, y, eps, norm="linf")
    with pytest.raises(ThreatError, match="eps"):
        attack_on(model, attack, x, y, 0.2 if eps is None else None)
    labels_only = replace(robplug.target(model), offers="labels")
    remedy = "got one with labels" if isinstance(attack, GradientFree) else "flow/gradient-free needs scores only"
    with pytest.raises(ThreatError, match=remedy):
        attack.run(labels_only, x, y, ThreatModel("flow", eps), Rng(0, range(2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiStep(steps=0), "expected steps >= 1, got 0"),
        (lambda: MultiStep(restarts=0), "expected restarts >= 1, got 0"),
        (lambda: MultiStep(ladder=[0.1, -0.1]), "expected a ladder of radii >= 0"),
        (lambda: StAdv(tau=float("nan")), "expected a finite tau >= 0, got nan"),
        (lambda: StAdv(unit="pixels"), "expected unit to be pixel or normalized, got 'pixels'"),
        (lambda: StAdv(optimizer="adam"), "expected optimizer to be sgd or lbfgs, got 'adam'"),
        (lambda: StAdv(step_size=0), "expected a finite step_size > 0, got 0"),
        (lambda: GradientFree(population=3), "expected an even population >= 2, got 3"),
        (lambda: GradientFree(queries=20), "expected queries for one generation and one look, got 20; give > 20"),
        (lambda: GradientFree(sigma=-1.0), "expected a finite sigma > 0, got -1.0"),
    ],
)
def test_parameters_are_checked(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        make()


def test_no_image_and_no_budget_change_nothing() -> None:
    model, x, y = digits(4)
    for attack in QUICK:
        eps = None if isinstance(attack, StAdv) else 0.0
        assert attack_on(model, attack, x[:0], y[:0], eps).x_adv.shape == (0, 1, 8, 8)
        if eps is not None:
            assert torch.equal(attack_on(model, attack, x, y, eps).x_adv, x)


class NoNumber(nn.Module):
    """A model that has gone wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :3] * torch.nan


@pytest.mark.parametrize("attack", [MultiStep(), StAdv(), GradientFree()], ids=lambda attack: type(attack).__name__)
def test_a_model_without_numbers_is_named(attack: Attack) -> None:
    eps = None if isinstance(attack, StAdv) else 0.2
    with pytest.raises(ThreatError, match=r"expected .* got nan"):
        attack_on(NoNumber(), attack, torch.rand(2, 1, 4, 4), torch.tensor([0, 1]), eps)


def test_an_image_of_one_pixel_stays_as_it_is() -> None:
    x, y, model = torch.rand(2, 3, 1, 1), torch.tensor([0, 1]), nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    for norm in ("flow", "flow-normalized"):
        for attack in QUICK:
            eps = None if isinstance(attack, StAdv) else 0.3
            found = attack_on(model, attack, x, model(x).argmax(1) if y is None else y, eps, norm)
            torch.testing.assert_close(found.x_adv, x)
            assert F.relu(FLOW.distance(x, found.x_adv, found.witness)).isfinite().all()
