"""Training: against plain torch, resumption bit for bit, schedules, patience."""

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

from robplug.adversarial import AdversarialTraining
from robplug.data import Dataset
from robplug.defenses import Defense
from robplug.errors import InputError, StoreError
from robplug.step import Step
from robplug.training import fit


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


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


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


@dataclass(frozen=True)
class InputGradient(Defense):
    """Adds the mean squared gradient of the summed loss with respect to x."""

    def penalty(self, step: Step) -> Tensor:
        clean = step.clean()
        (gradient,) = torch.autograd.grad(clean.loss.sum(), clean.x, create_graph=True)
        return gradient.float().square().flatten(1).sum(1).mean()


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


def test_draws_of_a_sample_are_new_in_each_step_and_its_own_in_each_batch() -> None:
    draws: list[dict[float, float]] = []

    @dataclass(frozen=True)
    class Watch(Defense):
        def penalty(self, step: Step) -> None:
            numbers = step.rng.uniform((), like=step.x).tolist()
            draws.append(dict(zip(step.x[:, 0, 0, 0].tolist(), numbers, strict=True)))

    fit(linear(), toy(), Watch(), epochs=2, batch_size=40)
    fit(linear(), toy(), Watch(), epochs=1, batch_size=20)
    first, second, half, _ = draws
    assert first.keys() == second.keys() and not set(first.values()) & set(second.values())
    assert len(half) == 20 and all(half[sample] == first[sample] for sample in half)


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


def test_resume_returns_what_was_finished_and_without_it_out_is_replaced(tmp_path: Path) -> None:
    first = state(fit(linear(), toy(), out=tmp_path, epochs=2))
    blank = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert_same(state(fit(blank, toy(), out=tmp_path, resume=True, epochs=2)), first)
    with pytest.raises(StoreError, match="weights of another model; choose another out"):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), toy(), out=tmp_path, resume=True, epochs=2)
    other = state(fit(linear(), toy(), out=tmp_path, epochs=3))
    assert_same(load_file(tmp_path / "weights.safetensors"), other)
    assert not torch.equal(other["1.weight"], first["1.weight"])


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


def test_threads_are_those_asked_for_and_put_back() -> None:
    counts: list[int] = []

    @dataclass(frozen=True)
    class Watch(Defense):
        def mode(self, model: nn.Module) -> None:
            counts.append(torch.get_num_threads())

    before = torch.get_num_threads()
    fit(linear(), toy(), Watch(), epochs=1, threads=before + 1)
    fit(linear(), toy(), Watch(), epochs=1)
    assert counts == [before + 1, before] and torch.get_num_threads() == before


def test_loss_that_is_not_finite_stops() -> None:
    with pytest.raises(InputError, match="a finite loss, got nan at step 0; lower lr"):
        model = linear()
        nn.init.constant_(model[1].weight, math.nan)
        fit(model, toy(), epochs=1)


def test_bfloat16_trains_and_keeps_float32_weights() -> None:
    model = linear()
    fit(model, toy(), [AdversarialTraining(eps=0.05, steps=2), InputGradient()], epochs=2, precision="bf16-mixed")
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_a_gpu_comes_back() -> None:
    model = with_norm()
    fit(model, toy(), "robplug/at", epochs=2, device="cuda", precision="16-mixed")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
