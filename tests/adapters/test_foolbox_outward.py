"""robplug's attacks as attacks of Foolbox, tested with Foolbox's own machinery."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import eagerpy as ep
import foolbox
import pytest
import torch
from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack, Repeated
from foolbox.criteria import Misclassification, TargetedMisclassification
from torch import Tensor, nn

from robplug.adapters.foolbox import attack, outward
from robplug.errors import InputError, ThreatError
from robplug.norms import L2, LINF
from robplug.plugins import Plugin, registry
from robplug.registry import Registry
from robplug.types import AttackSpec, NormSpec, Perturbed

EPSILONS = [0.01, 0.05, 0.2]


@pytest.fixture
def model() -> foolbox.PyTorchModel:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 5)).eval()
    return foolbox.PyTorchModel(network, bounds=(-1, 1), device="cpu", preprocessing={"std": torch.tensor(0.5)})


@pytest.fixture
def batch(model: foolbox.PyTorchModel) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.rand(12, 3, 4, 4) * 2 - 1
    return x, model(x).argmax(1)


@pytest.mark.parametrize(
    ("norm", "own"),
    [("linf", foolbox.attacks.LinfPGD), ("l2", foolbox.attacks.L2PGD)],
)
def test_it_answers_as_the_librarys_own_attack(norm: str, own: type, model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    ours = attack("robplug/pgd", norm=norm, steps=5, step_size=0.01, random_start=False, early_stop=False)
    theirs = own(steps=5, abs_stepsize=0.01, random_start=False)
    assert isinstance(ours, FixedEpsilonAttack)
    for mine, reference in zip(
        ours(model, x, Misclassification(y), epsilons=EPSILONS),
        theirs(model, x, Misclassification(y), epsilons=EPSILONS),
        strict=True,
    ):
        assert isinstance(mine, type(reference))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, reference, strict=True))


@pytest.mark.parametrize("norm", [LINF, L2])
def test_several_epsilons(norm: object, model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    raw, clipped, is_adv = attack("robplug/pgd", norm=norm.name)(model, x, y, epsilons=EPSILONS)
    assert len(raw) == len(clipped) == 3 and is_adv.shape == (3, 12) and is_adv.dtype == torch.bool
    for eps, x_adv, success in zip(EPSILONS, clipped, is_adv, strict=True):
        assert norm.distance(x, x_adv).max() <= norm.allowed(eps, 48, (-1.0, 1.0))
        assert torch.equal(success, model(x_adv).argmax(1) != y)
    counts = is_adv.sum(1).tolist()
    assert counts == sorted(counts) and counts[-1] > counts[0]


def test_goals_are_reached(model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    goal = (y + 1) % 5
    _, x_adv, is_adv = attack("robplug/pgd", steps=40)(model, x, TargetedMisclassification(goal), epsilons=0.8)
    assert is_adv.shape == (12,)
    assert torch.equal(is_adv, model(x_adv).argmax(1) == goal) and is_adv.float().mean() > 0.8


def test_eagerpy_in_and_out(model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = ep.astensors(*batch)
    raw, _, is_adv = attack("robplug/pgd")(model, x, Misclassification(y), epsilons=0.1)
    assert isinstance(raw, ep.PyTorchTensor) and isinstance(is_adv, ep.PyTorchTensor)


def test_minimal_attack_runs_once_for_all_epsilons(model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    deepfool = attack("foolbox/l2-deep-fool")
    assert isinstance(deepfool, MinimizationAttack)
    raw, clipped, is_adv = deepfool(model, x, y, epsilons=[None, 1e-4])
    assert torch.equal(raw[0], raw[1]) and torch.equal(clipped[0], raw[0])
    assert is_adv[0].all() and not is_adv[1].any()


def test_repeats_draw_anew(model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    noise = attack("robplug/noise", draws=1)
    seen: list[Tensor] = []
    run = noise.run
    noise.run = lambda *args, **kwargs: seen.append(run(*args, **kwargs)) or seen[-1]
    repeated = noise.repeat(3)
    assert isinstance(repeated, Repeated)
    _, _, is_adv = repeated(model, x, y, epsilons=0.05)
    draws = [tensor.raw for tensor in seen]
    assert len(draws) == 3
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    assert torch.equal(is_adv, torch.stack([model(draw).argmax(1) != y for draw in draws]).any(0))


def test_same_seed_same_calls(model, batch: tuple[Tensor, Tensor]) -> None:
    def twice(seed: int) -> tuple[Tensor, Tensor]:
        made = attack("robplug/noise", seed=seed, draws=1)
        return made(model, *batch, epsilons=0.1)[0], made(model, *batch, epsilons=0.1)[0]

    first, second = twice(3)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(twice(3), (first, second), strict=True))
    assert not torch.equal(twice(4)[0], first)


def test_errors(model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    with pytest.raises(ThreatError, match=r"serves \(linf, l2, l1\), got 'l7'"):
        attack("robplug/pgd", norm="l7")
    with pytest.raises(InputError, match="did you mean steps"):
        attack("robplug/pgd", step=3)
    with pytest.raises(InputError, match="Misclassification or TargetedMisclassification"):
        attack("robplug/pgd")(model, x, foolbox.criteria.Misclassification(y) & Misclassification(y), epsilons=0.1)
    with pytest.raises(ThreatError, match="expected a criterion that foolbox/linf-fast-gradient serves"):
        attack("foolbox/linf-fast-gradient")(model, x, TargetedMisclassification(y), epsilons=0.1)


class Rolled:
    """A norm of shifts: how many columns the image was rolled; no clipping of pixels keeps a roll a roll."""

    name = "shift"

    def distance(self, x: Tensor, x_adv: Tensor, witness: Tensor | None = None) -> Tensor:
        rows = zip(x, x_adv, witness.tolist(), strict=True)
        found = [float(by) if torch.equal(row.roll(by, -1), adv) else float("inf") for row, adv, by in rows]
        return torch.tensor(found, dtype=torch.float64)

    def allowed(self, eps: float, values: int, bounds: tuple[float, float]) -> float:
        return eps


@dataclass(frozen=True)
class Roll:
    """Rolls each image by a random number of columns, up to eps."""

    def run(self, target, x, y, threat, rng, *, y_goal=None) -> Perturbed:
        by = rng.integers(3 if threat.eps is None else int(threat.eps) + 1)
        return Perturbed(torch.stack([row.roll(int(k), -1) for row, k in zip(x, by, strict=True)]), by)


NORM = Rolled()


@pytest.fixture
def rolls(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = __name__ if __name__ in sys.modules else ""
    monkeypatch.setitem(sys.modules, "rolls", sys.modules.get(module) or type(sys)("rolls"))
    vars(sys.modules["rolls"]).update(Roll=Roll, NORM=NORM)
    specs = (
        AttackSpec(name="shift/roll", make="rolls:Roll", norms=("shift",), stochastic=True),
        AttackSpec(name="shift/least", make="rolls:Roll", norms=("shift",), budget="minimal", stochastic=True),
        NormSpec(name="shift", make="rolls:NORM"),
    )
    extended = Registry([*registry().plugins, Plugin("shift", "0", "rolls", specs)])
    monkeypatch.setattr(outward, "registry", lambda: extended)
    yield


@pytest.mark.usefixtures("rolls")
def test_a_norm_that_is_none_of_pixels_is_not_clipped(model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    roll = attack("shift/roll")
    assert not isinstance(roll, FixedEpsilonAttack | MinimizationAttack)
    raw, clipped, is_adv = roll(model, x, y, epsilons=[0, 2])
    assert torch.equal(raw[0], x) and not is_adv[0].any()
    assert torch.equal(raw[1], clipped[1]) and is_adv.shape == (2, 12)
    assert torch.equal(is_adv[1], model(raw[1]).argmax(1) != y) and is_adv[1].any()
    assert all(any(torch.equal(row.roll(k, -1), adv) for k in range(3)) for row, adv in zip(x, raw[1], strict=True))
    assert roll(model, x, y, epsilons=2)[2].shape == (12,)


@pytest.mark.usefixtures("rolls")
def test_its_repeats_keep_the_first_success(model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    once, often = attack("shift/roll"), attack("shift/roll").repeat(2).repeat(10)
    _, first, single = once(model, x, y, epsilons=2)
    _, best, repeated = often(model, x, y, epsilons=2)
    possible = torch.stack([model(x.roll(k, -1)).argmax(1) != y for k in (0, 1, 2)]).any(0)
    assert torch.equal(repeated, possible) and single.sum() < repeated.sum()
    assert torch.equal(best[single], first[single])
    with pytest.raises(InputError, match="times >= 1"):
        often.repeat(0)


@pytest.mark.usefixtures("rolls")
def test_its_repeats_keep_the_nearest_without_epsilon(model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    _, best, is_adv = attack("shift/least").repeat(20)(model, x, y, epsilons=None)
    one, two = x.roll(1, -1), x.roll(2, -1)
    expected = torch.where((model(one).argmax(1) != y)[:, None, None, None], one, two)
    assert is_adv.any() and torch.equal(best[is_adv], expected[is_adv])


@pytest.mark.usefixtures("rolls")
def test_what_lies_beyond_epsilon_is_not_adversarial(model, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    _, _, is_adv = attack("shift/least")(model, x, y, epsilons=[None, 0])
    assert is_adv[0].any() and not is_adv[1].any()


def test_importing_the_adapter_imports_no_library() -> None:
    code = "import sys, robplug.adapters.foolbox.plugin; sys.exit('torch' in sys.modules or 'foolbox' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
