"""Ghosts as targets: in plans, and as one instance that ART, Foolbox and torchattacks attack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.errors import InputError
from robplug.plugins import registry
from robplug.targets import Target
from robplug.zoo import resnet20
from robplug_ghost import GhostNetwork

X, Y = torch.rand(3, 3, 32, 32), torch.tensor([1, 2, 3])
STEPS = 3


def base() -> Target:
    torch.manual_seed(0)
    return robplug.target(resnet20().eval(), bounds=(0, 1), classes=10)


def a_ghost() -> tuple[GhostNetwork, list[int]]:
    """Returns a longitudinal ensemble, and the list of ghosts that its forward passes will be by."""
    ghost, seen = GhostNetwork(base().module, 0.22, 0.9, seed=7).eval(), []
    ghost.register_forward_hook(lambda module, args, out: seen.append(ghost.seed))
    return ghost, seen


def in_torchattacks(ghost: nn.Module) -> Tensor:
    import torchattacks

    return torchattacks.BIM(ghost, eps=8 / 255, alpha=2 / 255, steps=STEPS)(X, Y)


def in_foolbox(ghost: nn.Module) -> None:
    import foolbox

    fmodel = foolbox.PyTorchModel(ghost, bounds=(0, 1), device="cpu")
    foolbox.attacks.LinfBasicIterativeAttack(steps=STEPS)(fmodel, X, Y, epsilons=8 / 255)


def in_art(ghost: nn.Module) -> None:
    from art.attacks.evasion import BasicIterativeMethod
    from art.estimators.classification import PyTorchClassifier

    options = {"clip_values": (0.0, 1.0), "device_type": "cpu"}
    classifier = PyTorchClassifier(ghost, nn.CrossEntropyLoss(), (3, 32, 32), 10, **options)
    attack = BasicIterativeMethod(classifier, eps=8 / 255, eps_step=2 / 255, max_iter=STEPS, verbose=False)
    attack.generate(X.numpy(), Y.numpy())


def test_one_instance_in_all_libraries_has_as_many_ghosts_as_forward_passes() -> None:
    ghost, seen = a_ghost()
    for library, attack in (("torchattacks", in_torchattacks), ("foolbox", in_foolbox), ("art", in_art)):
        pytest.importorskip(library)
        before = len(seen)
        attack(ghost)
        assert len(seen) >= before + STEPS
    assert len(set(seen)) == len(seen)


def test_a_longitudinal_attack_is_one_with_a_ghost_for_each_step() -> None:
    """BIM by hand gives the same images as torchattacks'."""
    pytest.importorskip("torchattacks")
    ghost, seen = a_ghost()
    found = in_torchattacks(ghost)
    assert len(seen) == STEPS

    fixed, x = GhostNetwork(base().module, 0.22, 0.9, ghosts=1).eval(), X
    for seed in seen:
        fixed.resample(seed)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(fixed(leaf), Y), leaf)
        x = torch.clamp(X + (x + 2 / 255 * gradient.sign() - X).clamp(-8 / 255, 8 / 255), 0, 1)
    torch.testing.assert_close(found, x)


def test_a_ghost_is_made_of_one_target() -> None:
    with pytest.raises(InputError, match=r"expected exactly one target in `of` for ghost/both, got 0$"):
        registry().named_target("ghost/both")


@pytest.mark.parametrize("name", ["ghost/skip-erosion", "ghost/dropout-erosion", "ghost/both"])
def test_targets(name: str) -> None:
    plain = base()
    target = registry().named_target(name, plain)
    assert target.stochastic and (target.bounds, target.classes) == (plain.bounds, plain.classes)
    with torch.no_grad():
        target.reset(5)
        first, second = target.logits(X), target.logits(X)
        assert not torch.equal(first, second) and not torch.equal(first, plain.logits(X))
        target.reset(5)
        assert torch.equal(target.logits(X), first) and torch.equal(target.logits(X), second)
        standard = registry().named_target(name, plain, ghosts=2, seed=5)
        assert not standard.stochastic
        assert torch.equal(standard.logits(X), torch.stack([first, second]).mean(0))


def test_erosions_of_a_target_are_those_of_its_name() -> None:
    found = {
        name: registry().named_target(f"ghost/{name}", base()).module.found
        for name in ("skip-erosion", "dropout-erosion", "both")
    }
    assert {line.split()[0] for line in found["skip-erosion"]} == {"skip"} and len(found["skip-erosion"]) == 9
    assert {line.split()[0] for line in found["dropout-erosion"]} == {"dropout"} and len(found["dropout-erosion"]) == 9
    assert len(found["both"]) == 18


def test_what_is_drawn_for_the_base_stays_stochastic() -> None:
    import dataclasses

    noisy = dataclasses.replace(base(), stochastic=True)
    assert registry().named_target("ghost/skip-erosion", noisy, ghosts=2).stochastic


@pytest.mark.parametrize("count", [0, 2])
def test_one_base_is_wanted(count: int) -> None:
    from robplug_ghost.targets import skip_erosion

    with pytest.raises(InputError, match=f"one target to make ghosts of, got {count}; .*of = "):
        skip_erosion(*[base()] * count)


NETWORK = """
import torch
from torch import Tensor, nn
from robplug.zoo import digits_standard


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        for parameter in self.conv.parameters():
            parameter.data.normal_(0, 0.01, generator=generator)
        self.rest = digits_standard()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x + self.conv(x))
"""


def test_in_a_plan(tmp_path: Path) -> None:
    """Beside its base, attacked and as a source of transfer; a run repeats itself, and no pass is noted as a change."""
    (tmp_path / "network.py").write_text(NETWORK)
    plan = {
        "targets": [
            {"name": "base", "make": str(tmp_path / "network.py") + ":Residual"},
            {"name": "ghost", "make": "ghost/skip-erosion", "of": ["base"], "params": {"skip": 0.3}},
            {"name": "five", "make": "ghost/skip-erosion", "of": ["base"], "params": {"skip": 0.3, "ghosts": 5}},
            {"name": "all", "make": "robplug/ensemble", "of": ["base", "ghost"]},
        ],
        "datasets": [{"name": "digits", "samples": 16}],
        "threats": [{"norm": "linf", "eps": 0.15}],
        "probes": 0,
        "attacks": [{"name": "robplug/pgd", "steps": 4}],
    }
    runs = [robplug.evaluate(plan, out=tmp_path / str(number)) for number in (1, 2)]
    rows: list[list[dict[str, Any]]] = [run.rows() for run in runs]
    assert rows[0] == rows[1] and {row["target"] for row in rows[0]} == {"base", "ghost", "five", "all"}
    assert {row["status"] for row in rows[0]} <= {"misclassified", "robust", "broken"}
    for target in ("base", "ghost", "five", "all"):
        assert any(row["status"] == "broken" for row in rows[0] if row["target"] == target)
    records = [json.loads(path.read_text()) for path in (tmp_path / "1").rglob("cell.json")]
    assert len(records) == 4 and all(chunk["notes"] == [] for record in records for chunk in record["chunks"])

    transfer = {**plan, "transfer": [{"sources": ["ghost", "five", "all"], "victims": ["base"]}]}
    assert robplug.evaluate(transfer, out=tmp_path / "transfer").rows()
