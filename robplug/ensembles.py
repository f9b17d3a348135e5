"""Several models as one target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from robplug.errors import InputError
from robplug.targets import OFFERS, Target

Fuse = Literal["logits", "probabilities", "loss"]
AGREEMENT = 1e-6
"""Mass that the class of disagreement keeps at least: its logarithm and the gradient of that stay finite."""


class Ensemble(nn.Module):
    """The weighted mean of several networks' logits, probabilities or losses, as logits.

    Args:
        members: networks that map the same samples to logits of the same classes.
        weights: one number >= 0 a member, scaled to sum to 1.
        fuse: what is averaged. ``"logits"``: as Dong et al. 2018, section 3.4. ``"probabilities"``: the output is the
            logarithm of their mean. ``"loss"``: the cross-entropy of the output is the mean of the members'
            cross-entropies, value and gradient, in whatever library computes it; for that the output has one more
            column, the probability on which the members do not agree. A sample where it is the largest counts as
            misclassified.
    """

    def __init__(self, members: Sequence[nn.Module], weights: Sequence[float], fuse: Fuse) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.weights = tuple(weight / math.fsum(weights) for weight in weights)
        self.fuse = fuse
        self.extra_classes = int(fuse == "loss")

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, C) logits, or (N, C + 1) where losses are averaged."""
        logits = [member(x) for member in self.members]
        if len({own.shape[1] for own in logits}) > 1:
            raise InputError(
                "models with the same classes in an ensemble", f"{[own.shape[1] for own in logits]} of them"
            )
        if self.fuse == "logits":
            return self._mean(logits)
        logs = [own.log_softmax(1) for own in logits]
        if self.fuse == "probabilities":
            return torch.stack([own + math.log(w) for own, w in zip(logs, self.weights, strict=True) if w]).logsumexp(0)
        agreed = self._mean(logs)
        mass = agreed.logsumexp(1, keepdim=True).clamp(max=-AGREEMENT)
        return torch.cat([agreed, torch.log(-torch.expm1(mass))], dim=1)

    def _mean(self, tensors: list[Tensor]) -> Tensor:
        parts = [weight * tensor for weight, tensor in zip(self.weights, tensors, strict=True)]
        return torch.stack(parts).sum(0)

    def extra_repr(self) -> str:
        """Returns fuse and weights, which are no parameters and change the numbers."""
        return f"fuse={self.fuse!r}, weights={self.weights}"


def ensemble(*models: Any, weights: Sequence[float] | None = None, fuse: Fuse = "logits", **options: Any) -> Target:
    """Makes one target of several: `Ensemble` over their modules.

    Args:
        *models: anything that `robplug.target` takes.
        weights: one number >= 0 a model; all the same without.
        fuse: ``"logits"``, ``"probabilities"`` or ``"loss"``; see `Ensemble`.
        **options: for models that are no Targets yet, as of `robplug.target`.

    Returns:
        A Target that offers what the least generous member does, and is stochastic if any member is; it averages the
        largest number of draws that a member asks for.

    Raises:
        InputError: no model, weights that do not fit, or models of other bounds, devices, classes (as far as they are
            known) or tasks.
    """
    targets = [_as_target(model, options) for model in models]
    if not targets:
        raise InputError("at least one model in an ensemble", "none")
    if fuse not in get_args(Fuse):
        raise InputError(f"fuse to be one of {', '.join(get_args(Fuse))}", repr(fuse))
    shares = [1.0] * len(targets) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(targets):
        raise InputError(f"a weight for each of {len(targets)} models", shares)
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares) > 0:
        raise InputError("weights >= 0 with a positive sum", shares)
    for what in ("bounds", "device", "task"):
        values = {getattr(target, what) for target in targets}
        if len(values) > 1:
            raise InputError(f"models of one {what} in an ensemble", ", ".join(sorted(map(str, values))))
    classes = {target.classes for target in targets if target.classes is not None}
    if len(classes) > 1:
        raise InputError("models with the same classes in an ensemble", f"{sorted(classes)} of them")
    known = classes.pop() if classes else None
    return Target(
        module=Ensemble([target.module for target in targets], shares, fuse),
        bounds=targets[0].bounds,
        classes=known + 1 if known is not None and fuse == "loss" else known,
        offers=min((target.offers for target in targets), key=OFFERS.index),
        task=targets[0].task,
        stochastic=any(target.stochastic for target in targets),
        eot=max(target.eot for target in targets),
        draws=max(target.draws for target in targets),
    )


def of_list(models: Sequence[Any], **options: Any) -> Target:
    """Makes an ensemble of a list, for `robplug.target`."""
    return ensemble(*models, **options)


def _as_target(model: Any, options: dict[str, Any]) -> Target:
    from robplug.plugins import registry

    made = registry().named_target(model) if isinstance(model, str) else model
    return registry().target(made, **({} if isinstance(made, Target) else options))
