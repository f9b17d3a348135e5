"""robplug's attacks as attacks of torchattacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack as TorchattacksAttack

from robplug.adapters.common import check_exportable
from robplug.errors import ThreatError
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.targets import from_module
from robplug.types import Attack, AttackSpec, ThreatModel

ROUNDING = 1e-5
"""How far beyond [0, 1] torchattacks' inverse normalisation may leave an image, in float32."""


def attack(
    name: str, model: nn.Module, eps: float | None, norm: str | None, seed: int, params: dict[str, Any]
) -> TorchattacksAttack:
    """Makes the export; see `robplug.adapters.torchattacks.attack`."""
    spec: AttackSpec = registry().spec("attack", name)
    check_exportable(spec, "torchattacks")
    norm = spec.norms[0] if norm is None else norm
    if norm not in spec.norms:
        raise ThreatError(f"expected a norm that {name} serves ({', '.join(spec.norms)}), got {norm!r}")
    if (eps is None) != (spec.budget == "minimal"):
        want = "no eps: it looks for the smallest distance" if spec.budget == "minimal" else "eps, its radius"
        raise ThreatError(f"{name}: expected {want}, got eps={eps}")
    return ExportedAttack(registry().attack(name, **params), spec, model, ThreatModel(norm, eps), seed)


class ExportedAttack(TorchattacksAttack):  # type: ignore[misc]
    """A robplug attack.

    Args:
        inner: the attack.
        spec: what it can do.
        model: the network.
        threat: norm and radius; untargeted until one of torchattacks' targeted modes is set.
        seed: of the random numbers.
    """

    def __init__(self, inner: Attack, spec: AttackSpec, model: nn.Module, threat: ThreatModel, seed: int) -> None:
        super().__init__(spec.name, model)
        self.inner = inner
        self.spec = spec
        self.eps = threat.eps
        self.norm = threat.norm
        self._rng = Rng(seed, ())
        modes = {"default": spec.untargeted, "targeted": spec.targeted}
        self.supported_mode = [mode for mode, supported in modes.items() if supported]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Attacks images in [0, 1]; called by torchattacks, which has taken a normalisation off before.

        Args:
            images: (N, C, H, W).
            labels: (N,) true labels, or goals in the mode ``targeted(label)``; None means the network's own.
        """
        if not self.targeted and "default" not in self.supported_mode:
            raise ThreatError(f"{self.attack} reaches given classes only; call one of set_mode_targeted_*() first")
        images = _without_rounding(images.detach().to(self.device))
        labels = None if labels is None else labels.detach().to(self.device)
        goals = self.get_target_label(images, labels) if self.targeted else None
        target = from_module(_Logits(self.model, self.get_logits))
        threat = ThreatModel(self.norm, self.eps, targeted=self.targeted)
        rng = self._rng.next_call(len(images))
        return self.inner.run(target, images, None if self.targeted else labels, threat, rng, y_goal=goals).x_adv


class _Logits(nn.Module):
    """The network as torchattacks asks it: behind the normalisation, if one is set."""

    def __init__(self, model: nn.Module, get_logits: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._get_logits = get_logits

    def forward(self, x: Tensor) -> Tensor:
        return self._get_logits(x)


def _without_rounding(images: Tensor) -> Tensor:
    """Puts back what lies beyond [0, 1] by rounding; what lies further out is left to be refused."""
    inside = images.clamp(0.0, 1.0)
    return torch.where((images - inside).abs() <= ROUNDING, inside, images)
