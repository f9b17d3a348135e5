"""Training: the seam of defences against formulas and plain torch, resumption bit for bit, plans."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import robplug
from robplug.adversarial import AdversarialTraining
from robplug.data import Dataset
from robplug.defenses import Defense, NoDefense, Prepared, Stack
from robplug.errors import InputError, PlanError, RobplugError, StoreError
from robplug.plugins import registry
from robplug.registry import resolve
from robplug.rng import Rng
from robplug.step import Step, attacking, current_pass
from robplug.training import fit
from robplug.training_plan import load_train_plan, run_train_plan
from robplug.zoo import digits_cnn


def toy(count: int = 40) -> Dataset:
    x = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return Dataset("toy", x, (x.mean((1, 2, 3)) > 0.5).long())


def linear() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))


def with_norm() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(16, 2))
    return nn.Sequential(*layers)


def a_step(model: nn.Module, data: Dataset) -> Step:
    return Step(model, data.x, data.y, Rng(0, range(len(data))))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# one batch


def test_plain_training_is_that_of_torch() -> None:
    data, model, peer = toy(), with_norm(), with_norm()
    model[3].p = peer[3].p = 0.0
    optimizer = torch.optim.SGD(peer.parameters(), 0.1, 0.9, weight_decay=0.01)
    fit(model, data, epochs=3, batch_size=40, lr=0.1, weight_decay=0.01, schedule="constant", device="cpu")
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(peer(data.x), data.y).backward()
        optimizer.step()
    for mine, theirs in zip(model.state_dict().values(), peer.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)  # the samples' order differs


def test_adversarial_gradient_of_a_linear_model_is_the_closed_form() -> None:
    data, model, eps = toy(), linear(), 0.05
    data = Dataset("inside", data.x * 0.8 + 0.1, data.y)  # the box is never met
    stack = Stack(AdversarialTraining(eps=eps, steps=3))
    stack.prepare(model)
    step = a_step(model, data)
    stack.losses(step).total.backward()
    weight, bias = (parameter.detach().clone().requires_grad_() for parameter in model.parameters())
    flat = data.x.flatten(1)
    logits = flat @ weight.T + bias
    own, other = data.y, 1 - data.y
    # the worst change is -eps * sign(w_own - w_other): the margin falls by eps * ||w_own - w_other||_1
    margin = logits.gather(1, own[:, None]) - logits.gather(1, other[:, None])
    fall = eps * (weight[own] - weight[other]).abs().sum(1, keepdim=True)
    F.softplus(fall - margin).mean().backward()
    torch.testing.assert_close(model[1].weight.grad, weight.grad)
    torch.testing.assert_close(model[1].bias.grad, bias.grad)
    assert step.x_adv is not None and float((step.x_adv - data.x).abs().max()) <= eps * (1 + 1e-6)


@pytest.mark.parametrize("goal", ["random", "least-likely"])
def test_goals_are_wrong_classes(goal: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    x, y = torch.rand(400, 5), torch.randint(4, (400,))
    step = Step(model, x, y, Rng(0, range(400)))
    eps = 0.01
    Stack(AdversarialTraining(eps=eps, steps=1, step_size=1.0, goal=goal, random_start=False))._run = None  # type: ignore[attr-defined]
    stack = Stack(AdversarialTraining(eps=eps, steps=1, step_size=1.0, goal=goal, random_start=False))
    stack.prepare(model)
    stack.losses(step)
    # on a linear model one step of the attack goes to the corner given by the gradient of the goal's cross-entropy
    corners = []
    for goal_class in range(4):
        z = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(z), torch.full((400,), goal_class), reduction="sum"), z)
        corners.append((x - eps * gradient.sign()).clamp(0, 1))
    reached = torch.stack([torch.isclose(step.x_adv, corner, atol=1e-6).all(1) for corner in corners], dim=1)
    distinct = torch.stack(corners).unique(dim=0).shape[0] == 4
    assert distinct and reached.any(1).all()
    wrong = torch.ones(400, 4, dtype=torch.bool).scatter(1, y[:, None], False)
    assert (reached & wrong).any(1).all()
    if goal == "least-likely":
        least = model(x).scatter(1, y[:, None], math.inf).argmin(1)
        assert reached.gather(1, least[:, None]).all()
    else:
        only = reached.sum(1) == 1
        offset = (reached[only].int().argmax(1) - y[only]) % 4
        assert (offset.bincount(minlength=4)[1:] > 60).all()


def test_clean_share_and_label_smoothing() -> None:
    data, model = toy(), linear()
    untouched = 0
    for number in range(200):
        step = Step(model, data.x, data.y, Rng(number, range(40)))
        Stack(AdversarialTraining(eps=0.1, steps=1, clean_share=0.3)).defenses[0].objective(step)
        untouched += bool(torch.equal(step.x_adv, data.x))
    assert 40 <= untouched <= 80
    step = a_step(model, data)
    smooth = AdversarialTraining(clean_share=1.0, label_smoothing=0.2).objective(step)
    torch.testing.assert_close(smooth, F.cross_entropy(model(data.x), data.y, label_smoothing=0.2))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attack_mode_is_that_of_batch_norm_and_moves_nothing(mode: str) -> None:
    model = with_norm().train()
    seen: list[tuple[str, bool, bool]] = []
    model[1].register_forward_hook(lambda bn, i, o: seen.append((current_pass(), bn.training, model[3].training)))
    stack = Stack(AdversarialTraining(eps=0.1, steps=2, attack_mode=mode))
    stack.prepare(model)
    stack.train_mode()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with attacking(model, mode):
        model(toy().x)
    assert_same(buffers, dict(model.named_buffers()))
    assert all(part.training for part in model.modules())
    stack.train_batch(a_step(model, toy()), torch.optim.SGD(model.parameters(), 0.1))
    attacker, update = ("attacker", mode == "train", False), ("update", True, True)
    assert set(seen) == {attacker, update} and seen[-1] == update and seen.count(update) == 1
    assert int(model[1].num_batches_tracked) == 1
    assert current_pass() == "evaluation"


# the seam


@dataclass(frozen=True)
class Penalty(Defense):
    """Adds the mean squared gradient of the summed loss with respect to x, and logs another value."""

    strength: float = 3.0
    adversarial: bool = False

    def penalty(self, step: Step) -> tuple[Tensor, Tensor]:
        asked = step.adv() if self.adversarial else step.clean()
        (gradient,) = torch.autograd.grad(asked.loss.sum(), asked.x, create_graph=True)
        surrogate = self.strength * gradient.square().flatten(1).sum(1).mean()
        return torch.tensor(7.0), surrogate


@dataclass(frozen=True)
class Other(Defense):
    """An objective."""

    def objective(self, step: Step) -> Tensor:
        return step.clean().loss.sum()


def test_penalty_is_added_and_its_value_logged() -> None:
    data, model = toy(), linear()
    stack = Stack([Penalty(), Penalty(strength=1.0)])
    stack.prepare(model)
    losses = stack.losses(a_step(model, data))
    probability = model(data.x).softmax(1).gather(1, (1 - data.y)[:, None])[:, 0]
    difference = model[1].weight[0] - model[1].weight[1]
    by_hand = (probability**2).mean() * difference.square().sum()  # dL/dx = p_other * (w_other - w_own)
    torch.testing.assert_close(losses.total, F.cross_entropy(model(data.x), data.y) + 4 * by_hand)
    torch.testing.assert_close(losses.objective, F.cross_entropy(model(data.x), data.y).detach())
    assert losses.penalties == {"Penalty": torch.tensor(14.0)}
    losses.total.backward()
    analytic = model[1].weight.grad.clone()
    model.zero_grad()
    (F.cross_entropy(model(data.x), data.y) + 4 * (probability**2).mean() * difference.square().sum()).backward()
    torch.testing.assert_close(analytic, model[1].weight.grad)


def test_passes_are_shared_and_only_the_objective_moves_batch_norm() -> None:
    model, peer = with_norm(), with_norm()
    model[3].p = peer[3].p = 0.0
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    stack = Stack([AdversarialTraining(eps=0.1, steps=2), Penalty(adversarial=True), Penalty()])
    stack.prepare(model)
    stack.train_mode()
    step = a_step(model, toy())
    stack.train_batch(step, torch.optim.SGD(model.parameters(), 0.1))
    assert len(calls) == 2 + 1 + 1  # attack, adversarial pass shared, clean pass
    peer.train()(step.x_adv)
    torch.testing.assert_close(model[1].running_mean, peer[1].running_mean)
    torch.testing.assert_close(model[1].running_var, peer[1].running_var)


def test_adversarial_pass_without_an_adversary_is_an_error() -> None:
    with pytest.raises(InputError, match='put "robplug/at"'):
        Stack(Penalty(adversarial=True)).defenses[0].penalty(a_step(linear(), toy()))


def test_two_objectives_are_refused() -> None:
    with pytest.raises(InputError, match="AdversarialTraining and Other"):
        Stack(["robplug/at", Penalty(), Other()])
    with pytest.raises(InputError, match="derived from robplug.defenses.Defense"):
        Stack([object()])  # type: ignore[list-item]


@dataclass(frozen=True)
class Surgeon(Defense):
    """Multiplies the logits by a new parameter, which escapes weight decay, and keeps another in its state."""

    announce: bool = True
    replace: bool = False
    layers: tuple[str, ...] = ()

    def prepare(self, model: nn.Module) -> Prepared:
        scale, outside = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(2.0))
        model.register_parameter("scale", scale)
        if self.replace:
            model[1].bias = nn.Parameter(model[1].bias.detach().clone())
        new = (scale, outside) if self.announce else (outside,)
        return Prepared(outside, new, no_decay=(scale, model[1].weight), layers=self.layers)

    def penalty(self, step: Step) -> Tensor:
        outside: nn.Parameter = step.state
        return 0.5 * (outside - 3.0).square()

    def finish(self, model: nn.Module) -> nn.Module:
        seen.append((float(model.scale), {name: value.detach().clone() for name, value in model.named_parameters()}))
        del model.scale
        return model


seen: list[tuple[float, dict[str, Tensor]]] = []


@dataclass(frozen=True)
class Silent(Defense):
    """An objective that says nothing: whatever moves, moves by weight decay."""

    def objective(self, step: Step) -> Tensor:
        return 0.0 * step.clean().loss.sum()


def test_new_parameters_are_trained_and_some_escape_weight_decay() -> None:
    model = linear()
    before = state(model)
    seen.clear()
    options: dict[str, Any] = {"epochs": 1, "batch_size": 40, "lr": 0.1, "weight_decay": 0.5, "schedule": "constant"}
    assert fit(model, toy(), [Silent(), Surgeon()], **options) is model
    scale, after = seen[0]
    assert scale == 1.5 and "scale" not in dict(model.named_parameters())
    assert torch.equal(after["1.weight"], before["1.weight"])
    torch.testing.assert_close(after["1.bias"], before["1.bias"] * (1 - 0.1 * 0.5))


def test_a_parameter_that_only_a_defence_keeps_is_trained() -> None:
    kept: list[nn.Parameter] = []

    @dataclass(frozen=True)
    class Keeper(Surgeon):
        def penalty(self, step: Step) -> Tensor:
            kept.append(step.state)
            return super().penalty(step)

    fit(linear(), toy(), Keeper(), epochs=1, batch_size=40, lr=0.1, weight_decay=0.0, momentum=0.0, schedule="constant")
    assert math.isclose(float(kept[0]), 2.0 - 0.1 * (2.0 - 3.0), rel_tol=1e-6)


def test_surgery_is_checked() -> None:
    with pytest.raises(InputError, match="announce all new parameters, got also scale"):
        Stack(Surgeon(announce=False)).prepare(linear())
    with pytest.raises(InputError, match=r"keep the model's parameters, got without 1\.bias"):
        Stack(Surgeon(replace=True)).prepare(linear())
    with pytest.raises(InputError, match=r"a layer of Sequential for Surgeon, got '11'; there is 1"):
        Stack(Surgeon(layers=("11",))).prepare(linear())


def test_activations_of_named_layers_are_kept() -> None:
    model = linear()
    stack = Stack(Surgeon(layers=("0", "1")))
    stack.prepare(model)
    step = a_step(model, toy())
    stack.losses(step)
    clean = step.clean()
    assert torch.equal(clean.activations["0"], toy().x.flatten(1)) and clean.activations["1"] is clean.logits
    assert not model[0]._forward_hooks


def test_mode_and_after_step_are_called() -> None:
    @dataclass(frozen=True)
    class Frozen(Defense):
        def mode(self, model: nn.Module) -> None:
            model[1].eval()

        def after_step(self, model: nn.Module) -> None:
            with torch.no_grad():
                model[5].bias.zero_()

    model = with_norm()
    fit(model, toy(), Frozen(), epochs=2, batch_size=16)
    assert int(model[1].num_batches_tracked) == 0 and (model[5].bias == 0).all()
    assert not model.training


# fit


def test_schedules_and_drops() -> None:
    rates: list[float] = []

    @dataclass(frozen=True)
    class Watch(Defense):
        def penalty(self, step: Step) -> None:
            rates.append(optimizers[0].param_groups[0]["lr"])

    optimizers: list[torch.optim.Optimizer] = []
    original = torch.optim.SGD.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        optimizers.insert(0, self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "__init__", remember)
        fit(linear(), toy(), Watch(), epochs=4, batch_size=20, lr=0.4, schedule=[1, 3])
        fit(linear(), toy(), Watch(), epochs=2, batch_size=20, lr=0.4)
    assert rates[:8] == pytest.approx([0.4] * 2 + [0.04] * 4 + [0.004] * 2)
    assert rates[8:] == pytest.approx([0.2 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


def test_training_follows_from_the_seed_and_leaves_global_generators() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models = [with_norm() for _ in range(3)]
    torch.set_rng_state(before)
    for model, seed in zip(models, (1, 1, 2), strict=True):
        fit(model, toy(), "robplug/at", epochs=2, batch_size=16, seed=seed)
        torch.rand(3)
    one, two, three = (state(model) for model in models)
    assert_same(one, two)
    assert not torch.equal(one["5.weight"], three["5.weight"])
    torch.set_rng_state(before)
    model = with_norm()
    before = torch.get_rng_state()
    fit(model, toy(), epochs=1)
    assert torch.equal(before, torch.get_rng_state())


@dataclass(frozen=True)
class Interrupt(AdversarialTraining):
    """Adversarial training in which Ctrl-C is pressed after some steps."""

    def after_step(self, model: nn.Module) -> None:
        countdown[0] -= 1
        if countdown[0] == 0:
            signal.raise_signal(signal.SIGINT)


countdown = [0]


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_interrupted_and_resumed_training_ends_with_the_same_bits(tmp_path: Path, steps: int, optimizer: str) -> None:
    options: dict[str, Any] = {
        "epochs": 3, "batch_size": 12, "lr": 0.01, "optimizer": optimizer, "device": "cpu", "held_out": 0.1,
    }  # fmt: skip
    whole, parts = with_norm(), with_norm()
    defense = Interrupt(eps=0.1, steps=2, patience=2)
    countdown[0] = 0
    fit(whole, toy(), defense, out=tmp_path / "whole", **options)
    countdown[0] = steps
    with pytest.raises(KeyboardInterrupt):
        fit(parts, toy(), defense, out=tmp_path / "parts", **options)
    marks = list((tmp_path / "parts").glob("checkpoint-*.pt"))
    assert [mark.name for mark in marks] == [f"checkpoint-{steps:09d}.pt"]
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    torch.manual_seed(99)
    again = with_norm()
    nn.init.zeros_(again[5].weight)  # all of it comes from the checkpoint
    fit(again, toy(), defense, out=tmp_path / "parts", resume=True, **options)
    assert_same(state(whole), state(again))
    for folder in ("whole", "parts"):
        assert_same(state(whole), load_file(tmp_path / folder / "weights.safetensors"))
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["train.json", "weights.safetensors"]
    histories = [json.loads((tmp_path / name / "train.json").read_text())["history"] for name in ("whole", "parts")]
    assert histories[0] == histories[1] and len(histories[0]) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupted(folder: Path) -> None:
    countdown[0] = 1
    with pytest.raises(KeyboardInterrupt):
        fit(linear(), toy(), Interrupt(steps=1), out=folder, epochs=2)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(StoreError, match=r"made with epochs = 2 and not 3; train that one to its end, or remove"):
        fit(linear(), toy(), Interrupt(steps=1), out=tmp_path, resume=True, epochs=3)
    with pytest.raises(StoreError, match="made with defenses = "):
        fit(linear(), toy(), Interrupt(steps=2), out=tmp_path, resume=True, epochs=2)
    with pytest.raises(StoreError, match="of another model"):
        wide = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        fit(wide, toy(), Interrupt(steps=1), out=tmp_path, resume=True, epochs=2)
    mark = next(tmp_path.glob("*.pt"))
    mark.write_bytes(mark.read_bytes()[:100])
    with pytest.raises(StoreError, match="is damaged"):
        fit(linear(), toy(), Interrupt(steps=1), out=tmp_path, resume=True, epochs=2)


def test_weights_without_a_mark_are_no_checkpoint(tmp_path: Path) -> None:
    interrupted(tmp_path)
    next(tmp_path.glob("*.pt")).unlink()
    countdown[0] = 0
    fit(linear(), toy(), Interrupt(steps=1), out=tmp_path, resume=True, epochs=2)
    assert len(json.loads((tmp_path / "train.json").read_text())["history"]) == 2


def test_patience_keeps_the_best_weights() -> None:
    scores, weights = iter([0.2, 0.6, 0.4, 0.5, 0.9]), []

    @dataclass(frozen=True)
    class Scored(Defense):
        patience: int | None = 2

        def score(self, step: Step) -> Tensor:
            assert not step.model.training and len(step.x) == 10
            weights.append(state(step.model))
            return torch.arange(10) < 10 * next(scores)

    model = linear()
    fit(model, toy(), Scored(), epochs=5, held_out=0.25)
    assert len(weights) == 4  # two epochs without anything better than the second
    assert_same(state(model), weights[1])
    with pytest.raises(InputError, match="held-out samples to stop early by"):
        fit(linear(), toy(), Scored(), epochs=5)


def test_held_out_samples_are_not_trained_on() -> None:
    trained: set[float] = set()
    scored: set[float] = set()

    @dataclass(frozen=True)
    class Watch(Defense):
        def objective(self, step: Step) -> Tensor:
            trained.update(step.x[:, 0, 0, 0].tolist())
            return super().objective(step)

        def score(self, step: Step) -> Tensor:
            scored.update(step.x[:, 0, 0, 0].tolist())
            return step.y == step.y

    fit(linear(), toy(), Watch(), epochs=2, held_out=0.2, batch_size=7)
    assert len(trained) == 32 and len(scored) == 8 and not trained & scored


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epoch": 3}, "epoch: unknown key; did you mean epochs?"),
        ({"epochs": 0}, "epochs: input should be greater than or equal to 1, got 0"),
        ({"lr": -1.0}, "lr: .*greater than 0, got -1.0"),
        ({"schedule": [3], "epochs": 3}, "schedule of epochs below 3"),
        ({"held_out": 0.001}, "held_out that leaves some of 40 samples on both sides, got 0.001"),
        ({"device": "tpu"}, "auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:99"}, "a CUDA device for cuda:99"),
    ],
)
def test_unfit_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        fit(linear(), toy(), **options)


def test_loss_that_is_not_finite_stops() -> None:
    with pytest.raises(InputError, match="a finite loss, got nan at step 0; lower lr"):
        model = linear()
        nn.init.constant_(model[1].weight, math.nan)
        fit(model, toy(), epochs=1)


def test_bfloat16_trains_and_keeps_float32_weights() -> None:
    model = linear()
    fit(model, toy(), [AdversarialTraining(eps=0.05, steps=2), Penalty()], epochs=2, precision="bf16-mixed")
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.gpu
def test_training_on_a_gpu_comes_back() -> None:
    model = with_norm()
    fit(model, toy(), "robplug/at", epochs=2, device="cuda", precision="16-mixed")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    "wrong",
    [{"goal": "any"}, {"attack_mode": "test"}, {"clean_share": 1.5}, {"steps": 0}, {"patience": 0}, {"eps": -0.1}],
)
def test_unfit_parameters_of_adversarial_training_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((InputError, RobplugError), match=str(next(iter(wrong.values())))):
        robplug.defense("robplug/at", **wrong)


def test_specs_agree_with_their_classes() -> None:
    for name in ("robplug/at", "robplug/none"):
        spec = registry().spec("defense", name)
        made = resolve(spec)()
        assert {key: getattr(made, key) for key in spec.params} == dict(spec.params)
        assert set(spec.params) == set(made.__dataclass_fields__)
        assert spec.pieces == tuple(p for p in ("prepare", "objective", "penalty", "mode", "after_step", "finish")
                                    if getattr(type(made), p) is not getattr(Defense, p))  # fmt: skip
    assert isinstance(robplug.defense("robplug/none"), NoDefense)


# real digits


def robust_accuracy(model: nn.Module) -> float:
    data = robplug.dataset("digits", split="test")
    target = robplug.target(model)
    threat = robplug.ThreatModel(norm="linf", eps=0.2)
    x_adv = robplug.attack("robplug/pgd", steps=10).run(target, data.x, data.y, threat, Rng(0, range(len(data)))).x_adv
    return float((target.predict(x_adv) == data.y).float().mean())


def clean_accuracy(model: nn.Module) -> float:
    data = robplug.dataset("digits", split="test")
    return float((model(data.x).argmax(1) == data.y).float().mean())


def test_adversarial_training_on_digits_makes_robust(tmp_path: Path) -> None:
    train = robplug.dataset("digits", split="train")
    torch.manual_seed(0)
    standard, robust = digits_cnn(), digits_cnn()
    fit(standard, train, "robplug/none", epochs=6, batch_size=32)
    at = robplug.defense("robplug/at", eps=0.2, steps=3)
    fit(robust, train, at, epochs=10, batch_size=32)
    assert clean_accuracy(standard) > 0.97 and clean_accuracy(robust) > 0.93
    assert robust_accuracy(standard) < 0.1
    assert robust_accuracy(robust) > 0.4


# plans

PLAN = """
model = "robplug/digits-cnn"
epochs = 1
batch_size = 64
out = "OUT"

[dataset]
name = "digits"
samples = 200

[[defenses]]
name = "robplug/at"
eps = "51/255"
steps = 1
"""


def test_a_plan_trains_and_can_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for number in range(2):
        plan = tmp_path / f"{number}.toml"
        plan.write_text(PLAN.replace("OUT", str(tmp_path / f"out{number}")))
        torch.manual_seed(number)
        results.append(load_file(run_train_plan(plan)))
    assert_same(*results)
    record = json.loads((tmp_path / "out0" / "train.json").read_text())
    assert record["defenses"][0]["eps"] == 0.2 and record["schema_version"] == 1
    assert record["data"] == robplug.dataset("digits", split="train").head(200).digest
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(
        word in lines[0] for word in ("epoch   1/1", "loss", "accuracy", "samples/s", "left")
    )


def test_a_plan_may_name_a_model_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net(width):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'model = "mine.py:net"\nparams = {{ width = 3 }}\ndataset = "digits"\nepochs = 1\nout = "{tmp_path / "out"}"\n'
    )
    assert set(load_file(run_train_plan(plan, progress=False))) == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("epochs", "epoch"), r"plan.toml: epoch: unknown key; did you mean epochs\?"),
        (("epochs = 1", "epochs = 0"), "plan.toml: epochs: .* got 0"),
        (("samples = 200", "sample = 200"), r"dataset.sample: unknown key; did you mean samples\?"),
        (("samples = 200", "samples = 2000"), "2000 asked for, it has 1201"),
        (('out = "OUT"', ""), "plan.toml: out: is missing"),
        (('name = "robplug/at"', 'name = "robplug/att"'), r"defenses: no defense named 'robplug/att'; did you mean"),
        (("steps = 1", "step = 1"), r"defenses: expected a parameter of robplug/at, got 'step'; did you mean steps\?"),
        (("robplug/digits-cnn", "robplug/digit-cnn"), r"no target named 'robplug/digit-cnn'; did you mean"),
        (("[dataset]", "[dataset"), "is not valid TOML"),
    ],
)
def test_unfit_plans_are_refused(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN.replace("OUT", str(tmp_path / "out")).replace(change[0], change[1]).replace("OUT", ""))
    if change[0] == 'out = "OUT"':
        plan.write_text(PLAN.replace(*change))
    with pytest.raises(PlanError, match=says):
        run_train_plan(plan)
    assert not (tmp_path / "out").exists()


def test_demo_plans_are_valid() -> None:
    root = Path(__file__).parents[1] / "benchmarks" / "demo"
    for name in ("standard", "adversarial"):
        plan = load_train_plan(root / f"{name}.toml")
        assert plan.out == f"runs/demo/{name}" and plan.model == "robplug/digits-cnn"
