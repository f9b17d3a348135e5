"""Each attack as an attack of ART, Foolbox and torchattacks: the images are those of the attack itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.types import ThreatModel
from robplug_flow.norm import FLOW

PARAMS: dict[str, dict[str, int]] = {
    "flow/single-step": {},
    "flow/multi-step": {"steps": 4},
    "flow/stadv": {"steps": 5},
    "flow/gradient-free": {"queries": 41},
}
EPS = 0.15


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    data = robplug.dataset("digits", split="test").head(12)
    return robplug.target("robplug/digits-standard").module, data.x, data.y


def radius(name: str) -> float | None:
    return None if name == "flow/stadv" else EPS


def own(name: str, eps: float | None, call: int = 1) -> Tensor:
    """Returns what the attack itself gives for the streams of an export's n-th call."""
    model, x, y = digits()
    streams = Rng(0, ())
    rng = [streams.next_call(len(x)) for _ in range(call)][-1]
    return robplug.attack(name, **PARAMS[name]).run(robplug.target(model), x, y, ThreatModel("flow", eps), rng).x_adv


@pytest.mark.parametrize("name", PARAMS)
def test_in_torchattacks(name: str) -> None:
    pytest.importorskip("torchattacks")
    model, x, y = digits()
    eps = {} if radius(name) is None else {"eps": EPS}
    attack = robplug.adapters.torchattacks.attack(name, model, **eps, **PARAMS[name])
    x_adv = attack(x, y)
    torch.testing.assert_close(x_adv, own(name, radius(name)))
    assert (model(x_adv).argmax(1) != y).any()


@pytest.mark.parametrize("name", PARAMS)
def test_in_art(name: str) -> None:
    pytest.importorskip("art")
    from art.estimators.classification import PyTorchClassifier

    model, x, y = digits()
    options = {"clip_values": (0.0, 1.0), "device_type": "cpu"}
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, **options)
    eps = {} if radius(name) is None else {"eps": EPS}
    attack = robplug.adapters.art.attack(name, classifier, **eps, **PARAMS[name])
    x_adv = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    torch.testing.assert_close(x_adv, own(name, radius(name)))
    with pytest.raises(InputError, match="expected no mask under the norm flow"):
        attack.generate(x.numpy(), y.numpy(), mask=torch.ones(8, 8).numpy())


@pytest.mark.parametrize("name", PARAMS)
def test_in_foolbox_with_flow_budgets(name: str) -> None:
    foolbox = pytest.importorskip("foolbox")
    model, x, y = digits()
    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = robplug.adapters.foolbox.attack(name, **PARAMS[name])
    budgets = [0.05, EPS, 3.0]
    raw, clipped, is_adv = attack(fmodel, x, foolbox.criteria.Misclassification(y), epsilons=budgets)
    for number, (eps, one) in enumerate(zip(budgets, raw, strict=True), start=1):
        budget = None if radius(name) is None else eps
        torch.testing.assert_close(one, own(name, budget, call=number))
        assert torch.equal(one, clipped[number - 1])  # a clip of pixels would destroy it
    wrong = torch.stack([model(one).argmax(1) != y for one in raw])
    assert (is_adv <= wrong).all() and (is_adv[:-1] <= is_adv[1:]).float().mean() > 0.9
    if name != "flow/stadv":
        assert torch.equal(is_adv, wrong)
    assert is_adv[0].sum() < is_adv[-1].sum()


def test_in_a_plan_the_referee_measures_what_was_meant(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """0.0428571 half sides of a digit are 0.15 pixel: both threats are one."""
    plan = {
        "targets": [{"name": "robplug/digits-standard"}],
        "datasets": [{"name": "digits", "samples": 12}],
        "threats": [{"norm": "flow", "eps": EPS}, {"norm": "flow-normalized", "eps": EPS / 3.5}],
        "attacks": [{"name": "flow/single-step"}, {"name": "flow/stadv", "steps": 5}],
    }
    rows = robplug.evaluate(plan, out=tmp_path).rows()
    assert {row["status"] for row in rows} <= {"misclassified", "robust", "broken"}
    single = [row for row in rows if row["attack"] == "flow/single-step"]
    pixels, halves = ([row for row in single if row["norm"] == norm] for norm in ("flow", "flow-normalized"))
    assert [row["status"] for row in pixels] == [row["status"] for row in halves]
    assert any(row["status"] == "broken" for row in pixels)
    for one, other in zip(pixels, halves, strict=True):
        if one["status"] != "misclassified":
            assert one["distance"] == pytest.approx(EPS) and other["distance"] == pytest.approx(EPS / 3.5)
    assert FLOW.allowed(EPS, 64, (0.0, 1.0)) >= max(row["distance"] for row in pixels if row["status"] == "broken")
