"""The paper's defences: penalties on the sensitivity of activations, on the Jacobian of the logits, and on both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robplug.defenses import Defense, Prepared
from robplug.errors import InputError
from robplug.step import Step
from robplug_nsloss.activations import wanted_modules
from robplug_nsloss.comparison import loss_against
from robplug_nsloss.jacobian import check_projections, penalty_of
from robplug_nsloss.noise import Noise, check_samples
from robplug_nsloss.passes import quiet, watching

NOISE, DIRECTIONS = 1 << 33, (1 << 33) + 1
"""Restarts of a step's streams from which the seeds of noise and of random directions come."""


class _FineTuning(Defense):
    """A defence that may keep batch norm as it is."""

    frozen_batch_norm: bool

    def mode(self, model: nn.Module) -> None:
        """Puts batch norm into eval mode, if it is to be frozen; its weights are still trained."""
        if self.frozen_batch_norm:
            for part in model.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()


@dataclass(frozen=True)
class NsLoss(_FineTuning):
    """Adds strength * `robplug_nsloss.ns_loss` of the clean batch: how much noise changes the activations.

    The noise comes from PyTorch's generator on the device of the samples, seeded by the step; it depends on the whole
    batch, and on whether the device is a GPU. The clean pass is the stack's own if that drew no random numbers; with
    dropout on there is a further one without, since masks would count as sensitivity.

    Source: Fidel et al. 2020, section III-B, algorithm 1; the defaults are table I's for MNIST.
    Differs: see `robplug_nsloss.ns_loss`.

    Attributes:
        strength: factor of the penalty, the paper's lambda.
        radius: length of the noise in units of the data, the paper's NsEps.
        draws: noisy copies in a step, 1 to 127, the paper's N. Each costs a forward and a backward pass.
        layers: names of modules whose outputs are compared, ``"logits"`` for the model's; None means the logits and all
            ReLU-like outputs.
        clip: whether noisy copies are clipped to the bounds of the data.
        frozen_batch_norm: keep batch norm in eval mode in the whole training, as suits a trained model. Else noisy
            copies are normalised by the statistics of the clean batch, as constants.
    """

    strength: float = 2.0
    radius: float = 1.0
    draws: int = 5
    layers: Sequence[str] | None = None
    clip: bool = False
    frozen_batch_norm: bool = True

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)
        Noise(self.radius, self.draws)

    def prepare(self, model: nn.Module) -> Prepared:
        """Changes nothing; asks to see the activations of the stack's passes."""
        if self.layers is not None:
            wanted_modules(model, self.layers)
        observer = partial(watching, model, self.layers)
        return Prepared(state=observer, observer=observer)

    def penalty(self, step: Step) -> Tensor:
        """Returns the penalty of the clean batch, a scalar."""
        check_samples(step.x)
        clip = step.bounds if self.clip else None
        noise = Noise(self.radius, self.draws, clip, _generator(step, NOISE))
        if step.state in step.observers:
            clean = step.clean().observed.get(step.state)
            if clean is not None and not clean.drew:
                return self.strength * loss_against(clean, step.model, step.x, noise, self.layers)
        with quiet(step.model):
            with watching(step.model, self.layers) as clean:
                step.model(step.x)
            return self.strength * loss_against(clean, step.model, step.x, noise, self.layers)


@dataclass(frozen=True)
class JacobianRegularization(_FineTuning):
    """Adds strength * `robplug_nsloss.jacobian_penalty` of the clean batch.

    Source: Hoffman et al. 2019; Fidel et al. 2020, sections III-A and III-C; the defaults are table I's for MNIST.

    Attributes:
        strength: factor of the penalty, the paper's lambda.
        projections: random directions in a step; None means the exact Jacobian, at the cost of a backward pass a class.
        frozen_batch_norm: keep batch norm in eval mode in the whole training, as suits a trained model.
    """

    strength: float = 0.01
    projections: int | None = 1
    frozen_batch_norm: bool = True

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)
        check_projections(self.projections)

    def penalty(self, step: Step) -> Tensor:
        """Returns the penalty of the clean batch, a scalar."""
        return self.strength * _jacobian(step, self.projections)


@dataclass(frozen=True)
class Combined(NsLoss):
    """Adds strength * `robplug_nsloss.ns_loss` + jacobian_strength * `robplug_nsloss.jacobian_penalty`.

    Source: Fidel et al. 2020, section III-A; the defaults are table I's for MNIST.

    Attributes:
        strength: factor of NsLoss, the paper's lambda_1.
        jacobian_strength: factor of the Jacobian penalty, the paper's lambda_2.
        projections: random directions of the Jacobian in a step; None means the exact one.
    """

    jacobian_strength: float = 0.01
    projections: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_strength("jacobian_strength", self.jacobian_strength)
        check_projections(self.projections)

    def penalty(self, step: Step) -> Tensor:
        """Returns the penalty of the clean batch, a scalar."""
        return super().penalty(step) + self.jacobian_strength * _jacobian(step, self.projections)


def check_strength(name: str, value: float) -> None:
    """Refuses a factor that is negative or no finite number."""
    if not 0 <= value < float("inf"):
        raise InputError(f"a finite {name} >= 0", value)


def _jacobian(step: Step, projections: int | None) -> Tensor:
    check_samples(step.x)
    clean = step.clean()
    return penalty_of(clean.logits, clean.x, projections, _generator(step, DIRECTIONS))


def _generator(step: Step, use: int) -> torch.Generator:
    return torch.Generator(step.x.device).manual_seed(step.rng.at_restart(use).batch_seed())
