"""Foolbox models as targets: the logits must be those of the Foolbox model itself."""

from __future__ import annotations

import foolbox
import numpy as np
import pytest
import torch
from torch import nn

import robplug
from robplug.errors import InputError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval()


@pytest.mark.parametrize(
    "preprocessing",
    [
        None,
        {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "axis": -3},
        {"mean": np.float32(0.3)},
        {"std": torch.tensor([2.0, 3.0, 4.0]), "axis": -3},
        {"mean": [0.1, 0.2, 0.3], "axis": -3, "flip_axis": -3},
        {"flip_axis": -1},
    ],
)
@pytest.mark.parametrize("bounds", [(0, 1), (-1.0, 3.0)])
def test_logits_are_the_models_own(preprocessing: dict | None, bounds: tuple[float, float]) -> None:
    if preprocessing:
        preprocessing = {
            key: np.array(value, dtype=np.float32) if isinstance(value, list) else value
            for key, value in preprocessing.items()
        }
    fmodel = foolbox.PyTorchModel(network(), bounds=bounds, device="cpu", preprocessing=preprocessing)
    target = robplug.target(fmodel)
    x = (torch.rand(7, 3, 4, 4) * (bounds[1] - bounds[0]) + bounds[0]).requires_grad_()
    assert torch.equal(target.logits(x), fmodel(x))
    assert target.bounds == (float(bounds[0]), float(bounds[1]))
    ours, theirs = (torch.autograd.grad(logits.square().sum(), x)[0] for logits in (target.logits(x), fmodel(x)))
    assert torch.equal(ours, theirs)


def test_transformed_bounds_are_honoured() -> None:
    inner = foolbox.PyTorchModel(
        network(), bounds=(0, 1), device="cpu", preprocessing={"mean": 0.5 * torch.ones(3), "axis": -3}
    )
    fmodel = inner.transform_bounds((-1, 1))
    target = robplug.target(fmodel)
    x = torch.rand(7, 3, 4, 4) * 2 - 1
    assert target.bounds == (-1.0, 1.0)
    assert torch.equal(target.logits(x), fmodel(x))
    assert torch.allclose(target.logits(x), inner((x + 1) / 2), atol=1e-5)


def test_target_has_the_networks_parameters_and_modes() -> None:
    module = network()
    target = robplug.target(foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu", preprocessing={"flip_axis": -1}))
    assert next(target.module.parameters()) is module[1].weight
    target.module.train()
    assert module.training


def test_options_are_those_of_a_module() -> None:
    fmodel = foolbox.PyTorchModel(network(), bounds=(0, 1), device="cpu")
    assert robplug.target(fmodel, classes=5, offers="scores").offers == "scores"
    with pytest.raises(InputError, match=r"own bounds \(0.0, 1.0\), got bounds=\(0, 2\); leave bounds out"):
        robplug.target(fmodel, bounds=(0, 2))
