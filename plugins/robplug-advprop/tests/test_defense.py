"""The defences: against algorithm 2 written out with plain networks, and attackers with a closed form."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.defenses import Stack
from robplug.errors import InputError
from robplug.rng import Rng
from robplug.step import Step, current_pass
from robplug_advprop import route
from robplug_advprop.attackers import Attacker
from robplug_advprop.defense import AdvProp, VanillaMixing


def network(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 8), nn.BatchNorm1d(8)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, classes))


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(count, 1, 8, 8), torch.arange(count) % 10


def a_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    return Step(model, x, y, Rng(0, range(len(x))))


def linear() -> nn.Module:
    """Returns a prepared network whose gradient has a closed form, with other signs on the auxiliary statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 2))
    AdvProp().prepare(model)
    nn.init.normal_(model[1].auxiliary[0].weight)
    nn.init.normal_(model[1].auxiliary[0].running_mean)
    return model.train()


def uphill(model: nn.Module, scale: Tensor, y: Tensor) -> Tensor:
    """Returns the sign of the loss's gradient at any x."""
    weight = model[2].weight.detach()
    return (scale.detach() * (weight[1 - y] - weight[y])).sign().view(-1, 1, 8, 8)


@pytest.mark.parametrize("average", [False, True])
def test_a_step_is_algorithm_2_written_out(average: bool) -> None:
    model, (x, y) = network(), batch()
    clean_net, adv_net = copy.deepcopy(model), copy.deepcopy(model)
    for place in (0, 4, 7):
        adv_net[place] = clean_net[place]  # everything but batch norm is shared
    defense = AdvProp(eps=0.1, average=average)
    defense.prepare(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = defense.objective(step := a_step(model.train(), x, y))
    assert all(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    expected = F.cross_entropy(clean_net(x), y) + F.cross_entropy(adv_net(step.x_adv), y)
    expected = expected / 2 if average else expected
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for place in (0, 1, 4, 5, 7):
        torch.testing.assert_close(model[place].weight.grad, clean_net[place].weight.grad, rtol=1e-4, atol=1e-6)
    for place in (1, 5):
        own, other = model[place], model[place].auxiliary[0]
        torch.testing.assert_close(other.weight.grad, adv_net[place].weight.grad, rtol=1e-4, atol=1e-6)
        for name, buffer in clean_net[place].named_buffers():  # each fed once: the attack left no trace
            torch.testing.assert_close(own.get_buffer(name), buffer)
            torch.testing.assert_close(other.get_buffer(name), adv_net[place].get_buffer(name))


def test_the_attack_is_on_the_auxiliary_statistics_in_eval_mode() -> None:
    model, (x, y) = linear(), batch()
    y = y % 2
    step = a_step(model, x, y)
    AdvProp(eps=0.02, attack="i-fgsm").objective(step)
    auxiliary = uphill(model, model[1].auxiliary[0].weight, y)
    assert not torch.equal(auxiliary, uphill(model, model[1].weight, y))
    torch.testing.assert_close(step.x_adv, (x + 0.02 * auxiliary).clamp(0, 1))
    assert all(part.training for part in model.modules())


def test_no_batch_norm_is_in_train_mode_in_the_attack() -> None:
    model, (x, y) = linear(), batch()
    y, seen = y % 2, []
    model.eval()
    model[1].train()  # what a model's own mode does not tell
    model[1].auxiliary[0].register_forward_pre_hook(lambda layer, _: seen.append((layer.training, current_pass())))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with route(model, 1):
        x_adv = Attacker("i-fgsm", 2 / 255, 2, 1 / 255).run(a_step(model, x, y))
    assert seen == [(False, "attacker")] * 2
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    up = uphill(model, model[1].auxiliary[0].weight, y)
    torch.testing.assert_close(x_adv, (x + 2 / 255 * up).clamp(0, 1))
    assert model[1].training and not model.training


def test_the_attackers() -> None:
    model, (x, y) = linear(), batch()
    y, eps, size = y % 2, 4 / 255, 1 / 255
    with route(model, 1):
        found = {name: Attacker(name, eps, None, size).run(a_step(model, x, y)) for name in ("pgd", "gd", "i-fgsm")}
    up = uphill(model, model[1].auxiliary[0].weight, y)
    torch.testing.assert_close(found["i-fgsm"], (x + eps * up).clamp(0, 1))
    start = Rng(0, range(6)).at_restart(0).uniform((1, 8, 8), -eps, eps, like=x)
    start = (x + start).clamp(0, 1)
    free = (start + 5 * size * up).clamp(0, 1)
    torch.testing.assert_close(found["gd"], free)
    assert (found["gd"] - x).abs().max() > 1.2 * eps
    # each step is projected, but all go the same way
    torch.testing.assert_close(found["pgd"], free.minimum(x + eps).maximum(x - eps))


@pytest.mark.parametrize(("eps", "steps"), [(0, 1), (0.5, 1), (1, 1), (2, 3), (3, 4), (4, 5), (3.5, 5)])
def test_the_papers_number_of_steps(eps: float, steps: int) -> None:
    assert Attacker("pgd", eps / 255, None, 1 / 255).how().steps == steps
    assert Attacker("pgd", eps * 0.1, None, 0.1).how().steps == steps


def test_the_control_sees_the_same_samples_through_one_batch_norm() -> None:
    model, (x, y) = network().train(), batch()
    plain = copy.deepcopy(model)
    loss = VanillaMixing(eps=0.1).objective(step := a_step(model, x, y))
    logits = plain(torch.cat([x, step.x_adv]))
    torch.testing.assert_close(loss, F.cross_entropy(logits[:6], y) + F.cross_entropy(logits[6:], y))
    for (name, one), (_, other) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    assert 0 < (step.x_adv - x).abs().max() <= 0.1 + 1e-6


def test_what_is_trained_and_what_remains() -> None:
    data = robplug.dataset("digits", split="train").head(64)
    model, before = network(), network().state_dict()
    stack = Stack("advprop/advprop")
    stack.prepare(model)
    own = {id(parameter) for parameter in model.parameters()}
    assert len(stack.new_parameters) == 4 and {id(parameter) for parameter in stack.new_parameters} <= own
    trained = robplug.train(model := network(), data, "advprop/advprop", epochs=1, batch_size=32)
    assert trained is model and [type(part) for part in model] == [type(part) for part in network()]
    assert all(not torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    plain = network()
    plain.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(plain.eval()(data.x), trained(data.x))


def test_an_interrupted_training_is_resumed_to_the_same_weights(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    data, options = robplug.dataset("digits", split="train").head(64), {"epochs": 2, "batch_size": 32}
    whole = robplug.train(network(), data, "advprop/advprop", **options)
    calls, objective = [], AdvProp.objective

    def failing(self: AdvProp, step: Step) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("boom")
        return objective(self, step)

    monkeypatch.setattr(AdvProp, "objective", failing)
    with pytest.raises(RuntimeError, match="boom"):
        robplug.train(network(), data, "advprop/advprop", out=tmp_path, **options)
    monkeypatch.undo()
    resumed = robplug.train(network(), data, "advprop/advprop", out=tmp_path, resume=True, **options)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_what_the_art_trainer_leaves_loads_in_torch_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("art")
    from art.estimators.classification import PyTorchClassifier

    data = robplug.dataset("digits", split="train").head(32)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"optimizer": optimizer, "clip_values": (0.0, 1.0), "device_type": "cpu"}
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, **options)
    trainer = robplug.adapters.art.trainer("advprop/advprop", classifier)
    trainer.fit(data.x.numpy(), data.y.numpy().astype(np.int64), batch_size=16, nb_epochs=1)
    assert not torch.equal(model[0].weight, network()[0].weight)
    predicted = torch.from_numpy(classifier.predict(data.x.numpy()))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.save(model, tmp_path / "model.pt")
    torch.save((data.x, predicted), tmp_path / "predicted.pt")
    words = [sys.executable, "-c", TORCH_ALONE]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TORCH_ALONE = """
import sys
import torch
from torch import nn

torch.set_num_threads(1)
layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 8), nn.BatchNorm1d(8)]
model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(8, 10))
model.load_state_dict(torch.load("weights.pt", weights_only=True), strict=True)
x, predicted = torch.load("predicted.pt", weights_only=True)
for network in (model, torch.load("model.pt", weights_only=False)):
    torch.testing.assert_close(network.eval()(x), predicted)
assert not [name for name in sys.modules if name.startswith(("robplug", "art"))]
"""


@pytest.mark.parametrize("make", [AdvProp, VanillaMixing])
@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"eps": -0.1}, "expected eps >= 0"),
        ({"attack": "fgsm"}, "attack to be one of pgd, gd, i-fgsm, got 'fgsm'"),
        ({"steps": 0}, "expected steps >= 1, got 0"),
        ({"step_size": 0.0}, "a finite step_size > 0, got 0.0"),
        ({"step_size": math.nan}, "a finite step_size > 0, got nan"),
    ],
)
def test_parameters_are_checked(make, params: dict[str, object], words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        make(**params)


def test_a_network_without_batch_norm_is_refused() -> None:
    data = robplug.dataset("digits", split="train").head(32)
    with pytest.raises(InputError, match="a model with batch norm, got Sequential without"):
        robplug.train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data, "advprop/advprop", epochs=1)
