"""The paper's defences: gradient penalties, and training on deformed images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from robplug.defenses import Defense, Prepared
from robplug.errors import InputError
from robplug.loop import Steps, ascend
from robplug.plugins import registry
from robplug.rng import Rng
from robplug.step import Step, attacking, untouched_buffers
from robplug.types import ThreatModel
from robplug_flow.attack import flow_problem
from robplug_flow.difference import differentiated, flow_gradient_difference
from robplug_flow.kernels.ops import flow_gradient_penalty, warp
from robplug_flow.units import UNITS, Unit, check_images, pixels_per_unit

Normalisation = Literal["sample", "paper"]
Gradient = Literal["exact", "difference"]


@dataclass(frozen=True)
class FlowGradientRegularization(Defense):
    """Adds strength * mean over the batch of ||dL_i/dv||^2 at v = 0: the squared flow gradient of each sample's loss.

    It is a closed form of the input gradient (`robplug_flow.flow_gradient_penalty`): no sampler is differentiated.

    Source: flow-gradient paper, equation 11 with q = 2.
    Differs: the default strength does not depend on the batch size. The authors take the gradient of the batch's mean
        loss; ``normalisation="paper"`` does so, and takes their lambda (400, 700, 1000 at batch size 128) as printed.

    With ``gradient="difference"`` and no other objective in the stack, the plain one is made here as well: one backward
    pass gives the gradients by images and by parameters.

    Attributes:
        strength: factor of the penalty; the default is the paper's lambda = 400 at batch size 128, 400 / 128^2.
        normalisation: ``"sample"``: the gradient of each sample's own loss; ``"paper"``: of the mean loss, which is
            smaller by the batch size, so that the penalty is smaller by its square.
        unit: of the flow: ``"normalized"`` as in the paper, or ``"pixel"``.
        gradient: ``"exact"`` by double backward; ``"difference"`` by one more pass at a displaced x, which is faster
            and samples the curvature of kinks that double backward omits: the same for smooth activations, another
            estimator for ReLU. See `robplug_flow.difference`.
        rho: length of the displacement as a share of the images', for ``"difference"``.
    """

    strength: float = 400 / 128**2
    normalisation: Normalisation = "sample"
    unit: Unit = "normalized"
    gradient: Gradient = "exact"
    rho: float = 1e-3

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        known = {"normalisation": get_args(Normalisation), "unit": UNITS, "gradient": get_args(Gradient)}
        for name, values in known.items():
            _check_choice(name, getattr(self, name), values)
        if not 0 < self.rho < 1:
            raise InputError("rho between 0 and 1", self.rho, "1e-3 suits single precision")

    gives_way = True

    def prepare(self, model: nn.Module) -> Prepared:
        """Changes nothing; makes room for the gradients that objective and penalty share in a step."""
        return Prepared(state=[])

    def objective(self, step: Step) -> Tensor:
        """Returns the mean loss of the clean batch."""
        if self.gradient == "exact" or not len(step.x):
            return super().objective(step)
        step.state[:] = [differentiated(step)]
        objective: Tensor = step.state[0].loss / len(step.x)
        return objective

    def penalty(self, step: Step) -> Tensor:
        """Returns the penalty of the clean batch, (N, C, H, W), a scalar."""
        check_images(step.x)
        kappas = pixels_per_unit(self.unit, *step.x.shape[2:])
        if self.gradient == "difference":
            known = step.state.pop() if step.state else None
            total = flow_gradient_difference(step, *kappas, self.rho, known)
        else:
            clean = step.clean()
            (gradient,) = torch.autograd.grad(clean.loss.sum(), clean.x, create_graph=True)
            total = flow_gradient_penalty(clean.x.detach(), gradient, *kappas).sum()
        return _per_batch(self.strength, self.normalisation, len(step.x), power=2) * total


@dataclass(frozen=True)
class InputGradientRegularization(Defense):
    """Adds strength * mean over the batch of the squared, or plain, Euclidean norm of each sample's input gradient.

    Source: flow-gradient paper, equation 5; Ross and Doshi-Velez 2018.
    Differs: equation 5 has the plain norm, and no code was released; squared, as the paper's flow gradients are, is the
        default. The paper's lambda (3000, 5000, 7000 at batch size 128) can be given as printed in either reading.

    Attributes:
        strength: factor of the penalty; the default is lambda = 3000 at batch size 128, squared: 3000 / 128^2.
        normalisation: ``"sample"``: the gradient of each sample's own loss; ``"paper"``: of the batch's mean loss.
        squared: whether norms are squared.
    """

    strength: float = 3000 / 128**2
    normalisation: Normalisation = "sample"
    squared: bool = True

    def __post_init__(self) -> None:
        _check_strength(self.strength)
        _check_choice("normalisation", self.normalisation, get_args(Normalisation))

    def penalty(self, step: Step) -> Tensor:
        """Returns the penalty of the clean batch, a scalar."""
        clean = step.clean()
        (gradient,) = torch.autograd.grad(clean.loss.sum(), clean.x, create_graph=True)
        flat = gradient.flatten(1).float()
        norms = flat.square().sum(1) if self.squared else torch.linalg.vector_norm(flat, dim=1)
        power = 2 if self.squared else 1
        return _per_batch(self.strength, self.normalisation, len(step.x), power) * norms.sum()


@dataclass(frozen=True)
class DeformationTraining(Defense):
    """Adversarial deformation training: the loss of images that the multi-step flow attack has moved.

    The attack sees the network in eval mode, begins at no flow and takes its last step's flow.

    Source: flow-gradient paper, section 5.3.

    Attributes:
        eps: flow budget, in the unit of the norm.
        norm: ``"flow-normalized"`` as in the paper, or ``"flow"`` for pixels.
        steps: gradient steps of the attack.
        step_size: length of a step; None means eps / steps, as in the authors' code.
        random_start: begin at a random flow instead.
    """

    eps: float = 0.01
    norm: str = "flow-normalized"
    steps: int = 7
    step_size: float | None = None
    random_start: bool = False

    def __post_init__(self) -> None:
        ThreatModel(self.norm, self.eps)
        self._steps()

    def objective(self, step: Step) -> Tensor:
        """Returns the mean loss of the moved images."""
        with attacking(step.model):
            target = registry().target(step.model, bounds=step.bounds)
            threat = ThreatModel(self.norm, self.eps, step.bounds)
            problem = flow_problem(target, step.x, step.y, threat, step.rng, None)
            step.x_adv = ascend(problem, self._steps()).x_adv
        return step.adv().loss.mean()

    def _steps(self) -> Steps:
        # with no step, Steps says what is wrong
        size = self.eps / max(self.steps, 1) if self.step_size is None else self.step_size
        return Steps(self.steps, size, random_start=self.random_start, early_stop=False)


@dataclass(frozen=True)
class RandomFlow(Defense):
    """Moves every pixel of every training image by a normally distributed flow, drawn anew in each step.

    Source: the flow-gradient paper's released code; the paper does not mention it.

    Attributes:
        sigma: standard deviation along each axis.
        unit: of sigma: ``"normalized"`` as there, or ``"pixel"``.
    """

    sigma: float = 0.01
    unit: Unit = "normalized"

    def __post_init__(self) -> None:
        if not 0 <= self.sigma < float("inf"):
            raise InputError("a finite sigma >= 0", self.sigma)
        _check_choice("unit", self.unit, UNITS)

    def augment(self, step: Step) -> Tensor:
        """Returns the moved images, (N, C, H, W)."""
        check_images(step.x)
        size = step.x.shape[2:]
        kappas = torch.tensor(pixels_per_unit(self.unit, *size), dtype=step.x.dtype, device=step.x.device)
        flow = step.rng.normal((2, *size), like=step.x) * (self.sigma * kappas.view(2, 1, 1))
        return warp(step.x, flow).clamp(*step.bounds)


def fgr(model: nn.Module, x: Tensor, y: Tensor, strength: float = 400 / 128**2, **options: object) -> Tensor:
    """Returns the flow gradient penalty of a batch under cross-entropy, to be added to the loss in any training loop.

    It makes a forward pass of its own, in which batch norm's running statistics do not move. Who has the input gradient
    already can do without: ``strength * flow_gradient_penalty(x, gradient_of_the_summed_loss).mean()``.

    Args:
        model: maps images to logits.
        x: (N, C, H, W) images.
        y: (N,) int64 labels.
        strength: factor of the penalty, as in `FlowGradientRegularization`.
        **options: its other parameters.

    Returns:
        A scalar, differentiable once.

    Raises:
        InputError: an option or the images do not fit.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, y = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
        >>> loss = torch.nn.functional.cross_entropy(net(x), y) + fgr(net, x, y)
        >>> loss.backward()
    """
    defense = FlowGradientRegularization(strength, **options)  # type: ignore[arg-type]
    with untouched_buffers(model):
        return defense.penalty(Step(model, x, y, Rng(0, range(len(x)))))


def _per_batch(strength: float, normalisation: Normalisation, count: int, power: int) -> float:
    """Returns the factor of a sum over samples, each a power of the gradient of its own loss."""
    return strength / max(count, 1) / (count**power if normalisation == "paper" and count else 1)


def _check_strength(strength: float) -> None:
    if not 0 <= strength < float("inf"):
        raise InputError("a finite strength >= 0", strength)


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} to be {' or '.join(known)}", repr(value))
