"""What chapter 6 does to batch norm: which parameters and statistics move in training, and which do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robplug
from robplug.data import Dataset
from robplug.defenses import Defense
from robplug.errors import InputError
from robplug_advprop import convert_group_norm
from robplug_advprop.defense import AdvProp, VanillaMixing
from robplug_advprop.protocols import BatchNormOnly, GroupNormControl, RunningStatistics


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))


def digits() -> Dataset:
    return robplug.dataset("digits", split="train").head(64)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train(model: nn.Module, *defenses: Defense, **options: Any) -> nn.Module:
    return robplug.train(model, digits(), list(defenses), **{"epochs": 1, "batch_size": 32, **options})


def test_training_by_running_statistics_is_training_the_frozen_network() -> None:
    model = network()
    nn.init.uniform_(model[1].running_var, 0.5, 2.0)
    before, data = state(model), digits()
    peer = network()
    peer.load_state_dict(before)
    F.cross_entropy(peer.eval()(data.x), data.y).backward()
    options = {"batch_size": 64, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    train(model, RunningStatistics(), **options)
    assert all(torch.equal(model[1].get_buffer(name), before[f"1.{name}"]) for name, _ in model[1].named_buffers())
    for name, parameter in peer.named_parameters():
        torch.testing.assert_close(model.state_dict()[name], before[name] - 0.1 * parameter.grad)


def test_the_last_epochs_of_a_mixture_by_running_statistics() -> None:
    first = AdvProp(eps=0.1, keep="all")
    model = train(network(), first)
    before = state(model)
    train(model, first, RunningStatistics())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("running" in name or "tracked" in name), name


def test_batch_norm_alone_is_trained() -> None:
    model = network()
    before = state(model)
    train(model, BatchNormOnly(), weight_decay=0.1)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (not name.startswith("1.")), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_group_norm_stays() -> None:
    trained = train(network(), GroupNormControl(groups=3), VanillaMixing(eps=0.1))
    fresh = convert_group_norm(network(), 3)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert isinstance(trained[1], nn.GroupNorm) and torch.equal(fresh(digits().x), trained(digits().x))
    assert not torch.equal(trained[1].weight, network()[1].weight)


@pytest.mark.parametrize("defense", [RunningStatistics(), BatchNormOnly(), GroupNormControl()])
def test_a_network_without_batch_norm_is_refused(defense: Defense) -> None:
    with pytest.raises(InputError, match="a model with batch norm, got Sequential without"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), defense)
    with pytest.raises(InputError, match="groups >= 1, got 0"):
        GroupNormControl(groups=0)
