"""The Jacobian penalty: closed form, exact Jacobians of torch.func, and the estimator's mean."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from robplug.errors import InputError
from robplug_nsloss import jacobian_penalty


def network(activation: type[nn.Module] = nn.ReLU, batch_norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3) if batch_norm else nn.Identity()
    model = nn.Sequential(nn.Conv2d(2, 3, 3), norm, activation(), nn.Flatten(), nn.Linear(27, 4))
    model(torch.randn(8, 2, 5, 5))
    return model.eval()


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(6, 2, 5, 5, dtype=dtype)


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """Half the mean of ||J||_F^2 by torch.func, differentiable in the parameters."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def logits(sample: Tensor) -> Tensor:
        return functional_call(model, state, (sample[None],))[0]  # type: ignore[no-any-return]

    return vmap(jacrev(logits))(x).square().sum() / (2 * len(x))  # type: ignore[no-any-return]


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters()), materialize_grads=True))


def test_closed_form_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 3).double(), torch.randn(4, 5, dtype=torch.float64)
    value = jacobian_penalty(layer, x, projections=None)
    assert torch.allclose(value, layer.weight.square().sum() / 2, rtol=1e-13)
    (gradient,) = torch.autograd.grad(value, layer.weight)
    assert torch.allclose(gradient, layer.weight, rtol=1e-13)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_agrees_with_an_exact_jacobian(activation: type[nn.Module]) -> None:
    model, x = network(activation), images()
    value = jacobian_penalty(model, x, projections=None)
    assert torch.allclose(value, exact(model, x), rtol=1e-5)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_gradient_agrees_with_that_of_an_exact_jacobian(activation: type[nn.Module]) -> None:
    model, x = network(activation).double(), images(torch.float64)
    found, expected = jacobian_penalty(model, x, projections=None), exact(model, x)
    for a, b in zip(gradients(found, model), gradients(expected, model), strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1.0, float(b.abs().max()))


def test_the_estimate_is_unbiased() -> None:
    model, x = network(), images()
    expected = float(exact(model, x).detach())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([jacobian_penalty(model, x, projections=2, generator=generator) for _ in range(800)])
    error = float(draws.std()) / 800**0.5
    assert abs(float(draws.mean()) - expected) < 3 * error and error < 0.02 * expected


def test_with_one_class_one_direction_is_exact() -> None:
    """On the sphere in R^1 there are two points, and both give the gradient's norm."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1)), torch.randn(5, 4)
    assert torch.allclose(jacobian_penalty(model, x), jacobian_penalty(model, x, projections=None), rtol=1e-6)


def test_batch_norm_in_train_mode_keeps_its_running_statistics() -> None:
    model, x = network().train(), images()
    before = copy.deepcopy(model.state_dict())
    jacobian_penalty(model, x).backward()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items()) and model.training


def test_without_gradients() -> None:
    model, x = network(), images()
    with torch.no_grad():
        value = jacobian_penalty(model, x, projections=None)
    assert not value.requires_grad and torch.allclose(value, exact(model, x), rtol=1e-5)


def test_logits_that_do_not_depend_on_x() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] * 0

    assert jacobian_penalty(Constant(), torch.rand(2, 4)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jacobian_penalty(network(), images(), projections=0), "expected projections >= 1, or None .*, got 0"),
        (lambda: jacobian_penalty(network(), images()[:0]), "expected a batch of at least one sample"),
        (lambda: jacobian_penalty(nn.ReLU(), images()), r"expected logits of shape \(B, C\), got \(6, 2, 5, 5\)"),
    ],
)
def test_bad_input(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call()
