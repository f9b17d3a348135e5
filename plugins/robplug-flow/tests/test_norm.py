"""The flow norms: what they measure, and what they do not believe."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robplug.errors import InputError, ThreatError
from robplug.norms import Measuring
from robplug.rng import Rng
from robplug_flow import largest_displacement, to_normalized, to_pixels, total_variation, warp
from robplug_flow.norm import FLOW, FLOW_NORMALIZED, ROUNDINGS


def images(*shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (low + (high - low) * torch.rand(*shape)).to(dtype)


def flows(n: int, height: int, width: int, size: float = 1.5) -> Tensor:
    return (2 * torch.rand(n, 2, height, width) - 1) * size


def test_distance_of_a_shift_by_hand() -> None:
    x = torch.arange(12.0).view(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[0, 1] = 2.0  # each pixel comes from two columns to the right; the edge is repeated
    moved = torch.tensor([[2.0, 3, 3, 3], [6, 7, 7, 7], [10, 11, 11, 11]]).view(1, 1, 3, 4)
    assert FLOW.distance(x, moved, flow).tolist() == [2.0]
    assert FLOW_NORMALIZED.distance(x, moved, flow).tolist() == [pytest.approx(2 / 1.5)]
    assert FLOW.distance(x, moved, torch.stack([flow[:, 1], flow[:, 0]], dim=1)).tolist() == [math.inf]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0), (0.0, 255.0)])
def test_an_honest_flow_is_believed_in_every_precision(dtype: torch.dtype, bounds: tuple[float, float]) -> None:
    x = images(8, 3, 7, 6, low=bounds[0], high=bounds[1], dtype=dtype)
    flow = flows(8, 7, 6)
    x_adv = warp(x, flow).clamp(*bounds)
    distance = FLOW.distance(x, x_adv, flow)
    assert distance.dtype == torch.float64
    assert torch.equal(distance, flow.abs().flatten(1).amax(1).double())


def test_a_liar_cannot_claim_a_small_flow() -> None:
    x, flow = images(6, 1, 8, 8), flows(6, 8, 8)
    x_adv = warp(x, flow)
    assert FLOW.distance(x, x_adv, 0.5 * flow).isinf().all()
    assert FLOW.distance(x, x_adv, torch.zeros_like(flow)).isinf().all()
    assert FLOW.distance(x, x_adv, None).isinf().all()
    for wrong in (flow[:, :1], flow[:5], flow[..., :7]):
        assert FLOW.distance(x, x_adv, wrong).isinf().all()
    slightly = x_adv.clone()
    slightly[2, 0, 3, 3] += 2 * ROUNDINGS * 2**-24
    assert FLOW.distance(x, slightly, flow).isinf().tolist() == [i == 2 for i in range(6)]


def test_nothing_is_believed_of_nan() -> None:
    x, flow = images(3, 1, 5, 5), flows(3, 5, 5)
    x_adv = warp(x, flow)
    x_adv[0, 0, 0, 0] = math.nan
    flow[1, 0, 2, 2] = math.nan
    assert FLOW.distance(x, x_adv, flow).isinf().tolist() == [True, True, False]
    flow[2, 0, 0, 0] = -math.inf  # ends at the edge, so that it may even explain the image
    assert FLOW.distance(x, warp(x, flow), flow)[2] == math.inf


def test_units_and_metrics_by_hand() -> None:
    flow = torch.zeros(1, 2, 5, 9)
    flow[0, 0, 2, 3], flow[0, 1, 0, 0] = 1.0, -3.0
    assert largest_displacement(flow).tolist() == [3.0]
    assert largest_displacement(flow, "normalized").tolist() == [0.75]  # 3 of (9 - 1)/2, more than 1 of (5 - 1)/2
    assert torch.equal(to_pixels(to_normalized(flow)), flow)
    assert total_variation(flow).tolist() == [4 * 1.0 + 2 * 3.0]  # four neighbours in the middle, two in the corner
    assert total_variation(torch.full((2, 2, 4, 4), 0.7)).tolist() == [0.0, 0.0]
    paper = torch.full((1, 2, 32, 32), 0.01)
    assert to_pixels(paper)[0, 0, 0, 0] == pytest.approx(0.155)
    thin = torch.ones(1, 2, 1, 4)
    assert to_normalized(thin)[0, 0].isinf().all() and to_normalized(0 * thin).eq(0).all()


def test_a_normalised_flow_moves_the_grid_of_torch_by_as_much() -> None:
    """The paper's coordinates; such a grid has the columns first."""
    x, flow = images(2, 3, 6, 9, dtype=torch.float64), flows(2, 6, 9, 0.4).double()
    still = F.affine_grid(torch.eye(2, 3, dtype=torch.float64).expand(2, 2, 3), list(x.shape), align_corners=True)
    grid = still + flow.flip(1).permute(0, 2, 3, 1)
    expected = F.grid_sample(x, grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(warp(x, to_pixels(flow)), expected, rtol=0, atol=1e-12)


def test_the_norms_measure_total_variation_in_their_own_unit() -> None:
    x = images(3, 1, 5, 9)
    flow = torch.zeros(3, 2, 5, 9)
    flow[0] = 0.7  # all pixels alike
    flow[1, 0, 2:] = 1.0  # a step down between two rows of nine pixels
    flow[2, 1, :, 4:] = -1.0  # a step along columns, between five pairs
    x_adv = warp(x, flow)
    (name,) = FLOW.measures(x, x_adv, flow)
    assert name == "total variation"
    assert FLOW.measures(x, x_adv, flow)[name].tolist() == [0.0, 9.0, 5.0]
    assert FLOW_NORMALIZED.measures(x, x_adv, flow)[name].tolist() == [0.0, 9 / 2, 5 / 4]
    assert FLOW.measures(x, x_adv, flow.half())[name].dtype == torch.float64
    assert isinstance(FLOW, Measuring)


def test_what_is_no_flow_has_no_total_variation() -> None:
    x, flow = images(3, 1, 5, 5), flows(3, 5, 5)
    for norm in (FLOW, FLOW_NORMALIZED):
        for wrong in (None, flow[:, :1], flow[:2], flow[..., :4]):
            assert norm.measures(x, x, wrong)["total variation"].isnan().tolist() == [True] * 3


def test_ball_of_normalised_units_has_a_radius_per_axis() -> None:
    x = images(2, 1, 5, 9)
    ball = FLOW_NORMALIZED.ball(x, 0.1, (0.0, 1.0))
    far = torch.full((2, 2, 5, 9), 10.0)
    torch.testing.assert_close(ball.project(far)[0, :, 0, 0], torch.tensor([0.2, 0.4]))
    assert ball.steepest(-far, far)[0, :, 0, 0].tolist() == [-2.0, -4.0]


def test_what_no_flow_can_move_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected images of shape \(N, C, H, W\), got \(2, 9\); a flow moves pixels"):
        FLOW.ball(torch.rand(2, 9), 0.1, (0.0, 1.0))
    assert FLOW.distance(torch.rand(2, 9), torch.rand(2, 9), None).isinf().all()
    endless = FLOW_NORMALIZED.ball(images(1, 1, 1, 3), None, (0.0, 1.0))
    far = endless.project(torch.full((1, 2, 1, 3), 9.0))
    assert far[0, :, 0, 0].tolist() == [0.0, 9.0]  # along one row nothing moves, however large the radius
    with pytest.raises(ThreatError, match="expected a threat with eps"):
        endless.random(Rng(0, [0]))
