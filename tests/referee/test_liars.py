"""Attacks that lie, cheat or break: each must be caught, and leave nothing behind."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robplug
from robplug.attacks import FGSM
from robplug.isolation import ModuleState, global_numbers
from robplug.norms import LINF
from robplug.referee.guard import Assignment, Outcome, run_guarded
from robplug.referee.verify import Batch, verify
from robplug.rng import Rng
from robplug.targets import Target
from robplug.types import Perturbed, SampleResult

EPS = 0.1


class Net(nn.Module):
    """A linear classifier behind batch norm: modes, buffers and parameters to tamper with."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(16, 3)
        self.norm.running_mean.fill_(0.5)
        with torch.no_grad():
            self.out.weight.copy_(torch.randn(3, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.norm(x)).flatten(1))


@dataclass
class Case:
    target: Target
    batch: Batch


@pytest.fixture
def case() -> Case:
    model = Net()
    model.drop.train()
    model.norm.eval()
    target = robplug.target(model)
    x = torch.rand(12, 1, 4, 4)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    model.drop.train()
    prediction = y.clone()
    y[3] = (y[3] + 1) % 3  # misclassified before any attack
    return Case(target, Batch(list(range(100, 112)), x, y, None, prediction))


def judge(case: Case, run: Any, **options: Any) -> tuple[list[SampleResult], Outcome]:
    """Runs a function as an attack through guard and verification."""

    class Attack:
        def run(self, target: Target, x: Tensor, y: Tensor, threat: Any, rng: Rng, *, y_goal: Any = None) -> Any:
            return run(target, x, y)

    batch, attacked = case.batch, case.batch.attacked
    threat = robplug.ThreatModel("linf", EPS)
    ids = [i for i, wanted in zip(batch.ids, attacked.tolist(), strict=True) if wanted]
    x, y = batch.x[attacked], batch.y[attacked]
    before, numbers = ModuleState(case.target.module), global_numbers()
    outcome = run_guarded(Assignment(Attack(), case.target, LINF, threat, x, y, None, Rng(0, ids), **options))
    assert before.restore() == [], "the guard left the model changed"
    assert global_numbers() == numbers, "the guard left the random numbers changed"
    rows = verify(case.target, LINF, threat, batch, outcome, batch_size=5).rows
    assert [row.sample for row in rows] == batch.ids
    assert rows[3].status == "misclassified"
    return [row for row in rows if row.status != "misclassified"], outcome


def test_an_honest_attack_is_believed(case: Case) -> None:
    def honest(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        return robplug.attack("robplug/pgd").run(target, x, y, robplug.ThreatModel("linf", EPS), Rng(0, range(len(x))))

    rows, outcome = judge(case, honest)
    broken = [row.status == "broken" for row in rows]
    assert broken == [row.claim for row in rows] and any(broken)
    assert all(row.distance <= EPS * (1 + 1e-6) + 1e-7 for row in rows)
    assert outcome.notes == [] and outcome.error == ""
    assert outcome.forwards >= outcome.backwards > 0


def test_a_false_claim_is_not_believed(case: Case) -> None:
    rows, _ = judge(case, lambda target, x, y: Perturbed(x, None, torch.ones(len(x), dtype=torch.bool)))
    assert {row.status for row in rows} == {"robust"} and all(row.claim for row in rows)


def test_leaving_the_ball_is_invalid(case: Case) -> None:
    rows, _ = judge(case, lambda target, x, y: Perturbed(1 - x))
    far = [row for row in rows if row.distance > 2 * EPS]
    assert len(far) == len(rows) and {row.status for row in rows} == {"invalid"}
    for row in rows:
        clean = case.batch.x[row.sample - 100].double()
        distance = float((1 - 2 * clean).abs().max())
        assert row.distance == pytest.approx(distance, abs=1e-6) and row.excess == pytest.approx(
            distance - EPS, abs=1e-6
        )
        assert "leaves the ball" in row.note


def test_leaving_the_box_is_invalid(case: Case) -> None:
    def outside(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        return Perturbed(x + EPS * torch.where(x > 0.5, 1.0, -1.0))

    rows, _ = judge(case, outside)
    for row in rows:
        clean = case.batch.x[row.sample - 100]
        leaves = bool((clean > 1 - EPS).any() or (clean < EPS).any())
        assert (row.status == "invalid") == leaves
        assert ("leaves the bounds" in row.note) == leaves
    assert any(row.status == "invalid" for row in rows)


def test_nan_is_invalid_and_spoils_nobody_else(case: Case) -> None:
    def poisoned(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        x[::2] = float("nan")
        return Perturbed(x)

    rows, outcome = judge(case, poisoned)
    assert [row.status for row in rows] == ["invalid" if i % 2 == 0 else "robust" for i in range(len(rows))]
    assert all(row.note == "is not finite" for row in rows[::2])
    assert outcome.notes == ["changed the samples it was given"]


@pytest.mark.parametrize(
    ("returned", "note"),
    [
        (lambda x: None, "run returned a NoneType, expected a Perturbed"),
        (lambda x: x, "run returned a Tensor, expected a Perturbed"),
        (lambda x: Perturbed(x.numpy()), "ndarray"),
        (lambda x: Perturbed(x[:-1]), "shape"),
        (lambda x: Perturbed(x.double()), "float64"),
        (lambda x: Perturbed((x * 255).byte()), "uint8"),
    ],
    ids=["none", "tensor", "numpy", "shape", "float64", "uint8"],
)
def test_rubbish_is_invalid(case: Case, returned: Any, note: str) -> None:
    rows, _ = judge(case, lambda target, x, y: returned(x))
    assert {row.status for row in rows} == {"invalid"} and all(note in row.note for row in rows)


def mutate_weights(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.zero_()


def mutate_in_place(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).add_(1)


def mutate_buffers(module: nn.Module) -> None:
    module.train()
    module(torch.rand(4, 1, 4, 4))
    module.eval()


def write_gradients(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    module(torch.rand(4, 1, 4, 4)).sum().backward()


def replace_weights(module: nn.Module) -> None:
    out = next(part for part in module.modules() if isinstance(part, nn.Linear))
    out.weight = nn.Parameter(torch.zeros_like(out.weight))


def leave_a_hook(module: nn.Module) -> None:
    out = next(part for part in module.modules() if isinstance(part, nn.Linear))
    out.register_forward_hook(lambda part, inputs, output: output * 0)


def the_net(module: nn.Module) -> Net:
    return next(part for part in module.modules() if isinstance(part, Net))


class Blind(Net):
    """Sees nothing and calls everything class 0."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0


def put_a_forward_in_front(module: nn.Module) -> None:
    the_net(module).forward = lambda x: torch.zeros(len(x), 3)  # type: ignore[method-assign]


def change_the_class(module: nn.Module) -> None:
    the_net(module).__class__ = Blind


def hook_all_modules(module: nn.Module) -> None:
    nn.modules.module.register_module_forward_hook(
        lambda part, inputs, output: output * 0 if isinstance(part, Net) else output
    )


def hide_a_parameter(module: nn.Module) -> None:
    vars(the_net(module).out)["weight"] = torch.zeros(3, 16)


class Keeper(dict):  # type: ignore[type-arg]
    """A dict that shows nothing and loses nothing."""

    def __iter__(self) -> Any:
        return iter(())

    def clear(self) -> None: ...


def swap_the_hooks(module: nn.Module) -> None:
    net = the_net(module)
    vars(net)["_forward_hooks"] = Keeper({0: lambda part, inputs, output: output * 0})


def remove_the_hooks(module: nn.Module) -> None:
    vars(the_net(module))["_forward_hooks"] = None


def spoil_gradients(module: nn.Module) -> None:
    the_net(module).out.register_full_backward_pre_hook(lambda part, gradients: tuple(g * 0 for g in gradients))


def patch_the_class(module: nn.Module) -> None:
    Net.forward = lambda self, x: torch.zeros(len(x), 3)  # type: ignore[method-assign]


def patch_linear(module: nn.Module) -> None:
    nn.Linear.forward = lambda self, x: x.new_zeros(len(x), 3)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("mischief", "note"),
    [
        (hide_a_parameter, "attribute weight of"),
        (lambda module: setattr(the_net(module).norm, "eps", 1e12), "attribute eps of"),
        (swap_the_hooks, "attribute _forward_hooks of"),
        (remove_the_hooks, "attribute _forward_hooks of"),
        (spoil_gradients, "backward pre hooks of"),
        (patch_the_class, "forward of the class Net"),
        (patch_linear, "forward of the class Linear"),
        (put_a_forward_in_front, "attribute forward of"),
        (change_the_class, "class of"),
        (hook_all_modules, "hooks of all modules"),
        (mutate_weights, "parameter"),
        (mutate_in_place, "parameter"),
        (mutate_buffers, "running_mean"),
        (lambda module: module.train(), "mode of"),
        (lambda module: [p.requires_grad_(True) for p in module.parameters()], "requires_grad"),
        (write_gradients, ".grad of"),
        (replace_weights, "parameters of"),
        (leave_a_hook, "forward hooks of"),
        (lambda module: torch.manual_seed(1), "random numbers"),
        (lambda module: np.random.seed(1), "random numbers"),
        (lambda module: random.seed(1), "random numbers"),
    ],
    ids=[
        "hidden",
        "eps",
        "swapped-hooks",
        "no-hooks",
        "backward-pre-hook",
        "patched-class",
        "patched-linear",
        "forward",
        "class",
        "all-hooks",
        "data",
        "in-place",
        "buffers",
        "mode",
        "requires-grad",
        "grad",
        "replaced",
        "hook",
        "torch-seed",
        "numpy-seed",
        "random-seed",
    ],
)
def test_tampering_is_undone_and_noted(case: Case, mischief: Any, note: str) -> None:
    def tampering(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        mischief(target.module)
        return Perturbed(x)

    rows, outcome = judge(case, tampering)
    assert any(note in text for text in outcome.notes), outcome.notes
    assert {row.status for row in rows} == {"robust"}  # judged by the model as it was


class Smooth(Tensor):
    """Answers every subtraction with zeros: no distance is ever seen."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(function, types, args, kwargs or {})
        return torch.zeros_like(found) if "sub" in function.__name__ else found


def test_a_tensor_that_lies_about_itself_is_invalid(case: Case) -> None:
    rows, _ = judge(case, lambda target, x, y: Perturbed((1 - x).as_subclass(Smooth)))
    assert {row.status for row in rows} == {"invalid"} and "instead of a plain tensor" in rows[0].note


def test_an_attack_that_raises_becomes_rows(case: Case) -> None:
    def raising(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        target.logits(x)
        raise MemoryError("no room")

    rows, outcome = judge(case, raising)
    assert {row.status for row in rows} == {"error"} and rows[0].note == "MemoryError: no room"
    assert "raise MemoryError" in outcome.trace and outcome.forwards == 11


def test_exit_is_an_error_and_ctrl_c_is_not(case: Case) -> None:
    def leaving(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        raise SystemExit(0)

    assert judge(case, leaving)[0][0].status == "error"

    def interrupted(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(case, interrupted)


def test_the_time_limit_holds_against_an_attack_that_catches_everything(case: Case) -> None:
    def endless(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        while True:
            time.sleep(0.002)
            try:
                target.logits(x)
            except Exception:  # noqa: S112
                continue

    rows, _ = judge(case, endless, timeout_s=0.05)
    assert {row.status for row in rows} == {"error"} and "timeout_s=0.05" in rows[0].note


def test_silent_success_is_seen(case: Case) -> None:
    """The attack finds adversarial examples inside the ball and returns the clean samples."""

    def shy(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        threat = robplug.ThreatModel("linf", EPS)
        found = robplug.attack("robplug/pgd").run(target, x, y, threat, Rng(0, range(len(x))))
        target.logits(found.x_adv)
        shy.broken = (target.predict(found.x_adv) != y).tolist()  # type: ignore[attr-defined]
        return Perturbed(x)

    rows, _ = judge(case, shy)
    assert {row.status for row in rows} == {"robust"}
    assert [row.silent for row in rows] == shy.broken and any(shy.broken)  # type: ignore[attr-defined]


def test_success_outside_the_ball_is_no_silent_success(case: Case) -> None:
    def far(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        target.logits(1 - x)
        return Perturbed(x)

    assert not any(row.silent for row in judge(case, far)[0])


def test_passes_are_counted_in_rows(case: Case) -> None:
    def counting(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        leaf = x.clone().requires_grad_()
        logits = target.module(leaf[:4])
        torch.autograd.grad(logits[:, 0].sum(), leaf, retain_graph=True)
        torch.autograd.grad(logits[:, 1].sum(), leaf)
        target.logits(x.double())  # cast, not refused
        return Perturbed(x)

    _, outcome = judge(case, counting)
    assert (outcome.forwards, outcome.backwards) == (4 + 11, 8)


def test_weights_have_no_gradient_inside(case: Case) -> None:
    def look(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        assert not any(parameter.requires_grad for parameter in target.module.parameters())
        return Perturbed(x)

    assert judge(case, look)[1].error == ""


@pytest.mark.parametrize("offers", ["scores", "labels"])
def test_a_target_gives_no_more_than_it_offers(case: Case, offers: str) -> None:
    limited = Case(robplug.target(case.target.module, offers=offers), case.batch)

    def greedy(target: Target, x: Tensor, y: Tensor) -> Perturbed:
        logits = target.logits(x.requires_grad_())
        assert not logits.requires_grad
        assert offers == "scores" or set(logits.unique().tolist()) == {0.0, 1.0}
        return Perturbed(x.detach())

    assert judge(limited, greedy)[1].error == ""


@pytest.mark.parametrize("keep", ["examples", "all"])
@pytest.mark.parametrize(
    "lie",
    [
        lambda x: Perturbed(x.to_sparse()),
        lambda x: Perturbed(x.to("meta")),
        lambda x: Perturbed(x.to(torch.complex128)),
        lambda x: Perturbed(torch.nested.nested_tensor(list(x))),
        lambda x: Perturbed(x, x.to_sparse()),
        lambda x: Perturbed(x, torch.tensor(1.0)),
        lambda x: Perturbed(x, None, None, torch.ones(len(x), 3).to_sparse()),
        lambda x: Perturbed(x, None, None, torch.ones(len(x), 3, device="meta")),
    ],
)
def test_tensors_that_no_file_can_hold_end_no_run(
    lie: Any, keep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FGSM, "run", lambda self, target, x, *rest, **named: lie(x))
    plan = {
        "probes": 0,
        "targets": [{"name": "robplug/digits-standard"}],
        "datasets": [{"name": "digits", "samples": 3}],
        "threats": [{"norm": "linf", "eps": 0.1}],
        "attacks": [{"name": "robplug/fgsm"}],
        "keep": keep,
    }
    results = robplug.evaluate(plan, out=tmp_path)
    assert results.summary().finished and not any(row["status"] == "broken" for row in results.rows())


@pytest.mark.parametrize("lie", [lambda x: Perturbed(x.double()), lambda x: Perturbed(x, x.to("meta"))])
def test_what_the_source_could_not_judge_is_not_judged_elsewhere(
    lie: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FGSM, "run", lambda self, target, x, *rest, **named: lie(x))
    plan = {
        "probes": 0,
        "targets": [{"name": "a", "make": "robplug/digits-standard"}, {"name": "b", "make": "robplug/digits-at"}],
        "datasets": [{"name": "digits", "samples": 3}],
        "threats": [{"norm": "linf", "eps": 0.1}],
        "attacks": [{"name": "robplug/fgsm"}],
        "transfer": [{"sources": ["a"], "victims": ["b"]}],
    }
    rows = robplug.evaluate(plan, out=tmp_path).rows()
    assert all(row["status"] in ("invalid", "error") for row in rows if not row["source"])
    assert [row["status"] for row in rows if row["source"]] == ["unattacked"] * 3
