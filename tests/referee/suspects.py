"""Targets that look robust and are not, each in its own way; made from the digits networks that are shipped.

The first column of a digit is empty, so that a model can see there how far it has been pushed. All samples are
multiples of 1/16, so that it can see whether it was pushed at all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import robplug
from robplug.targets import Target
from robplug.zoo import digits_standard

Change = Callable[[Tensor], Tensor]


class Behind(nn.Module):
    """The standard network behind a change of its input, and one of its logits."""

    def __init__(self, before: Change = lambda x: x, after: Change = lambda logits: logits) -> None:
        super().__init__()
        self.inner, self.before, self.after = digits_standard(), before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


def upwards(x: Tensor) -> Tensor:
    return torch.ones_like(x[..., 0])


def with_gradient(signs: Change, column: Change = upwards, **options: bool) -> Target:
    """The standard network with another gradient, which is declared: signs(x) times the true one.

    In the empty column it is chosen: upwards, so that `pushed` tells how far an attack has come, or by ``column``.
    """

    def substitute(x: Tensor) -> Tensor:
        def steer(gradient: Tensor) -> Tensor:
            gradient = gradient * signs(x.detach())
            gradient[..., 0] = 1e-3 * column(x.detach())
            return gradient

        z = x.clone()
        if z.requires_grad:
            z.register_hook(steer)
        return z

    return robplug.target(digits_standard(), transform=lambda x: x, backward=substitute, **options)


def pushed(x: Tensor) -> Tensor:
    """(N, 1, 1, 1): how far the empty column is from empty."""
    return x[..., 0].flatten(1).amax(1).view(-1, 1, 1, 1)


def scattered(share: float, like: Tensor) -> Tensor:
    """+1 for a share of the pixels, -1 for the others, the same ones each time."""
    draws = torch.rand(like.shape[1:], generator=torch.Generator().manual_seed(1))
    return torch.where(draws < share, 1.0, -1.0).expand_as(like)


def masked() -> Target:
    """The gradient has the wrong sign on half of the pixels, up to some distance."""
    return with_gradient(lambda x: torch.where(pushed(x) > 0.25, 1.0, scattered(0.5, x)))


def right_at_the_sample() -> Target:
    """Up to some distance the gradient is right at the sample alone."""

    def signs(x: Tensor) -> Tensor:
        untouched = (x * 16 == (x * 16).round()).flatten(1).all(1).view(-1, 1, 1, 1)
        return torch.where(untouched | (pushed(x) > 0.25), 1.0, scattered(0.5, x))

    return with_gradient(signs)


def wrong_between(low: float, high: float, share: float = 1.0) -> Target:
    """The gradient has the wrong sign on a share of the pixels between two distances."""

    def signs(x: Tensor) -> Tensor:
        return torch.where((pushed(x) > low) & (pushed(x) < high), scattered(1 - share, x), 1.0)

    return with_gradient(signs)


def narrow(share: float = 0.7) -> Target:
    """The gradient is right on all pixels along a path that only small steps can keep to."""

    def signs(x: Tensor) -> Tensor:
        return torch.where((pushed(x) - 0.05).abs() < 0.005, 1.0, scattered(share, x))

    return with_gradient(signs, column=lambda x: (0.05 - x[..., 0]).sign())


def quantised() -> nn.Module:
    """Four grey levels: no gradient at all."""
    return Behind(before=lambda x: (x * 3).round() / 3)


def saturated() -> nn.Module:
    """Logits so large that the softmax underflows."""
    return Behind(after=lambda logits: logits * 1000)


def random_layer() -> nn.Module:
    """Noise that nobody has declared."""
    return Behind(before=lambda x: x + 0.02 * torch.randn_like(x))


def detector() -> nn.Module:
    """Answers nan where it sees that it is attacked."""
    return Behind(before=lambda x: torch.where(pushed(x) > 0.02, torch.nan, x))


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * torch.where(scattered(0.5, gradient) > 0, 4.0, 0.25)


def weighted() -> nn.Module:
    """The gradient has the right signs and the wrong sizes, which nobody has declared."""
    return Behind(before=_Weighted.apply)


def shattered() -> nn.Module:
    """A ripple that changes no picture and rules every gradient."""
    return Behind(before=lambda x: x + 0.005 * torch.sin(x * 2 * torch.pi / 0.0005))


def random_gradient() -> Target:
    """The gradient's signs are right a little more often than not, at random: averages find it."""
    return with_gradient(lambda x: torch.where(torch.rand_like(x) < 0.6, 1.0, -1.0), stochastic=True)


def slightly_random(model: str) -> Target:
    """A little declared noise."""
    inner = getattr(robplug.zoo, model)()
    return robplug.target(inner, transform=lambda x: x + 0.01 * torch.randn_like(x), stochastic=True)
