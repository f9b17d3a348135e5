"""The threat norms of flows: the largest displacement of a pixel, and the ball in which `robplug.loop` moves.

Convention:
    x_adv(p) = x(p + v(p)), bilinearly, edges clamped (`robplug_flow.warp`), then clamped to the bounds of the data.
    The witness of x_adv is its flow v, (N, 2, H, W) in pixels, (row, column), whatever the unit of the norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robplug.errors import ThreatError
from robplug.rng import Rng
from robplug_flow.kernels.ops import warp
from robplug_flow.metrics import largest_displacement, total_variation
from robplug_flow.units import Unit, check_images, pixels_per_unit, to_normalized

ROUNDINGS = 12
"""Units of rounding by which a correct warp may be off, relative to the largest |value|, M, of the image.

Written as a + w(b - a), an interpolation rounds b - a (2M at most), its product with w <= 1 (2M) and the sum (M): 5.
Two follow each other: 10. Each of the two weights, fractions below 1 rounded to half a unit, moves b - a by one more.
"""


@dataclass(frozen=True)
class FlowBall:
    """Flows around no flow; the variable z is the flow in pixels, in float32 at least.

    Attributes:
        x: (N, C, H, W) the clean images.
        eps: radius in the norm's unit; infinite for no limit.
        bounds: of the data.
        unit: (2, 1, 1) pixels per unit of the norm, along rows and columns.
        start: the origin's flow, or None for no flow.
    """

    x: Tensor
    eps: float
    bounds: tuple[float, float]
    unit: Tensor
    start: Tensor | None = None

    def origin(self) -> Tensor:
        """Returns no flow, or the start."""
        if self.start is not None:
            return self.start.clone()
        return self.unit.new_zeros(len(self.x), 2, *self.x.shape[2:])

    def random(self, rng: Rng) -> Tensor:
        """Returns flows whose displacements are uniform and independent."""
        if not math.isfinite(self.eps):
            raise ThreatError("expected a threat with eps to draw a random flow from, got eps=None")
        return rng.uniform((2, *self.x.shape[2:]), -1.0, 1.0, like=self.unit).mul_(self._radius())

    def decode(self, z: Tensor) -> Tensor:
        """Returns the moved images; rounding would leave the bounds without the clamp."""
        return warp(self.x, z).clamp(*self.bounds)

    def steepest(self, gradient: Tensor, z: Tensor) -> Tensor:
        """Returns the sign of the gradient, one unit of the norm long."""
        return gradient.sign().mul_(self.unit)

    def project(self, z: Tensor) -> Tensor:
        """Clamps each displacement to the radius."""
        radius = self._radius()
        return z.clamp_(-radius, radius)

    def witness(self, z: Tensor) -> Tensor:
        """Returns the flow itself."""
        return z

    def select(self, keep: Tensor) -> FlowBall:
        """Returns the ball of some of the images."""
        start = None if self.start is None else self.start[keep]
        return replace(self, x=self.x[keep], start=start)

    def _radius(self) -> Tensor:
        # along an axis of one pixel a unit is 0 pixels, and 0 times no limit is to be 0
        return self.unit * self.eps if math.isfinite(self.eps) else torch.where(self.unit == 0, 0.0, torch.inf)


@dataclass(frozen=True)
class FlowNorm:
    """The largest absolute displacement along an axis that turns x into x_adv.

    Many flows give one x_adv; what counts is the flow that is shown, once it is seen to give x_adv.

    Attributes:
        name: as in a threat.
        unit: of distances, radii and measures.
    """

    name: str
    unit: Unit

    def distance(self, x: Tensor, x_adv: Tensor, witness: Tensor | None = None) -> Tensor:
        """Returns max |v| of the witness v, or infinity where v does not turn x into x_adv.

        The warp is made again in float64; a pixel may be off by the rounding of a correct warp in the precision of x,
        and by that of a half-precision result. The bounds change nothing: a warped image has the values of x and those
        between.

        Args:
            x: (N, C, H, W) clean images.
            x_adv: likewise.
            witness: (N, 2, H, W) flow in pixels, (row, column).

        Returns:
            (N,) float64.
        """
        flow = _shown(x, witness)
        if flow is None:
            return torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        off = (warp(x.detach().double(), flow) - x_adv.detach().double()).abs_().flatten(1)
        # written so that a NaN explains nothing
        explained = (off <= _tolerance(x)[:, None]).all(1)
        return largest_displacement(flow, self.unit).masked_fill_(~explained, torch.inf)

    def measures(self, x: Tensor, x_adv: Tensor, witness: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the total variation of the witness, which says how rough it is, in the unit of the norm.

        Args:
            x: (N, C, H, W) clean images.
            x_adv: likewise; not looked at.
            witness: (N, 2, H, W) flow in pixels, (row, column).

        Returns:
            (N,) float64 under ``"total variation"``; nan without a flow.
        """
        flow = _shown(x, witness)
        if flow is None:
            return {"total variation": torch.full((len(x),), torch.nan, dtype=torch.float64, device=x.device)}
        return {"total variation": total_variation(flow if self.unit == "pixel" else to_normalized(flow))}

    def allowed(self, eps: float, values: int, bounds: tuple[float, float]) -> float:
        """Returns eps and what float32 adds: it rounds the radius, once more in normalised units."""
        return eps * (1 + 1e-6)

    def ball(self, x: Tensor, eps: float | None, bounds: tuple[float, float]) -> FlowBall:
        """Returns the ball of flows of radius eps (None: no limit).

        Raises:
            InputError: x has no rows and columns.
        """
        check_images(x)
        sides = pixels_per_unit(self.unit, *x.shape[2:])
        dtype = torch.promote_types(x.dtype, torch.float32)
        unit = torch.tensor(sides, dtype=dtype, device=x.device).view(2, 1, 1)
        return FlowBall(x, math.inf if eps is None else eps, bounds, unit)


def _shown(x: Tensor, witness: Tensor | None) -> Tensor | None:
    """Returns the witness in float64 if it has the shape of a flow of x, else None."""
    if x.dim() != 4 or witness is None or witness.shape != (len(x), 2, *x.shape[2:]):
        return None
    return witness.detach().to(x.device, torch.float64)


def _tolerance(x: Tensor) -> Tensor:
    """Returns (N,) float64: how far a correct warp of x may lie from the exact one."""
    computed = torch.promote_types(x.dtype, torch.float32)
    share = ROUNDINGS * torch.finfo(computed).eps / 2
    if computed != x.dtype:
        share += torch.finfo(x.dtype).eps / 2
    return share * x.detach().double().abs().flatten(1).amax(1)


FLOW = FlowNorm("flow", "pixel")
FLOW_NORMALIZED = FlowNorm("flow-normalized", "normalized")
