"""The definition of the kernels in plain PyTorch, forward and backward; what runs wherever Triton does not.

Everything is computed in float32, or in float64 where an argument is float64, and rounded once at the end.
Functions that end in ``_backward`` write only to buffers of their own, so that autograd can go through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Values of a batch that are worked on at once: beyond half a megabyte, page faults cost more than the arithmetic.
CHUNK = 2**17
# Under the root of the smoothness, so that it has a derivative where two neighbours move alike.
SOFTENING = 1e-8


def accumulator(*tensors: Tensor) -> torch.dtype:
    """Returns the dtype to compute in: float32, or float64 where a tensor has it."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """Returns (N, C, H, W): x sampled at p + flow(p)."""
    out, dtype = torch.empty_like(x), accumulator(x, flow)
    for part in _parts(x):
        indices, down, right = _taps(flow[part].to(dtype))
        upper_left, upper_right, lower_left, lower_right = _gather(x[part].to(dtype), indices)
        # lerp keeps its first argument bit for bit at weight 0
        upper, lower = upper_left.lerp_(upper_right, right), lower_left.lerp_(lower_right, right)
        out[part] = upper.lerp_(lower, down).reshape(x[part].shape)
    return out


def warp_adjoint(g: Tensor, flow: Tensor) -> Tensor:
    """Returns (N, C, H, W): the gradient of sum(g * warp(x, flow)) with respect to x, which x itself does not enter."""
    out, dtype = torch.empty_like(g), accumulator(g, flow)
    for part in _parts(g):
        indices, down, right = _taps(flow[part].to(dtype))
        lower = g[part].to(dtype).flatten(2) * down
        upper = g[part].to(dtype).flatten(2) - lower
        upper_right, lower_right = upper * right, lower * right
        corners = (upper.sub_(upper_right), upper_right, lower.sub_(lower_right), lower_right)
        out[part] = _scatter(corners, indices).reshape(g[part].shape)
    return out


def warp_flow_gradient(g: Tensor, x: Tensor, flow: Tensor) -> Tensor:
    """Returns (N, 2, H, W): the gradient of sum(g * warp(x, flow)) with respect to flow."""
    out, dtype = torch.empty_like(flow), accumulator(g, x, flow)
    for part in _parts(x):
        indices, down, right = _taps(flow[part].to(dtype))
        by_row, by_col = _slopes(_gather(x[part].to(dtype), indices), down, right)
        upstream = g[part].to(dtype).flatten(2)
        both = torch.stack([by_row.mul_(upstream).sum(1), by_col.mul_(upstream).sum(1)], dim=1)
        out[part] = both.reshape(flow[part].shape)
    return out


def warp_flow_gradient_backward(h: Tensor, g: Tensor, x: Tensor, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of sum(h * warp_flow_gradient(g, x, flow)) with respect to g, x and flow."""
    dtype = accumulator(g, x, flow)
    indices, down, right = _taps(flow.to(dtype))
    corners = _gather(x.to(dtype), indices)
    upper_left, upper_right, lower_left, lower_right = corners
    by_row, by_col = _slopes(corners, down, right)
    upstream = g.to(dtype).flatten(2)
    h_row, h_col = h.to(dtype).flatten(2).split(1, dim=1)
    twist = (upstream * (lower_right - lower_left - upper_right + upper_left)).sum(1, keepdim=True)
    a, b = upstream * h_row, upstream * h_col
    grad_corners = (
        -(1 - right) * a - (1 - down) * b,
        -right * a + (1 - down) * b,
        (1 - right) * a - down * b,
        right * a + down * b,
    )
    grad_g = (h_row * by_row + h_col * by_col).reshape(g.shape)
    grad_x = _scatter(grad_corners, indices).reshape(x.shape)
    grad_flow = torch.cat([h_col * twist, h_row * twist], dim=1).reshape(flow.shape)
    return grad_g.to(g.dtype), grad_x.to(x.dtype), grad_flow.to(flow.dtype)


def flow_gradient_penalty(x: Tensor, g: Tensor, kappa_row: float, kappa_col: float) -> Tensor:
    """Returns (N,): the squared norm of the flow gradient at flow 0, given the input gradient g."""
    out = torch.zeros(len(x), dtype=accumulator(x, g), device=x.device)
    for part in _parts(x):
        images, upstream = x[part].to(out.dtype), g[part].to(out.dtype)
        for dim, kappa in ((2, kappa_row), (3, kappa_col)):
            slope = _difference(images, dim).mul_(_before(upstream, dim)).sum(1)
            out[part] += slope.square_().sum((1, 2)).mul_(kappa**2)
    return out


def flow_gradient_penalty_gradient(
    u: Tensor, x: Tensor, g: Tensor, kappa_row: float, kappa_col: float, need_x: bool
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of sum(u * penalty) with respect to x (empty unless ``need_x``) and g."""
    grad_x, grad_g = torch.empty_like(x) if need_x else x.new_empty(0), torch.empty_like(g)
    dtype = accumulator(x, g)
    for part in _parts(x):
        images, upstream, scale = x[part].to(dtype), g[part].to(dtype), 2 * u[part].to(dtype).view(-1, 1, 1, 1)
        part_x, part_g = torch.zeros_like(images) if need_x else images, torch.zeros_like(images)
        for dim, kappa in ((2, kappa_row), (3, kappa_col)):
            difference, here = _difference(images, dim), _before(upstream, dim)
            slope = (difference * here).sum(1, keepdim=True).mul_(scale * kappa**2)
            _before(part_g, dim).addcmul_(difference, slope)
            if need_x:
                moved = torch.mul(here, slope, out=difference)
                _after(part_x, dim).add_(moved)
                _before(part_x, dim).sub_(moved)
        grad_g[part] = part_g
        if need_x:
            grad_x[part] = part_x
    return grad_x, grad_g


def flow_gradient_penalty_gradient_backward(
    h_x: Tensor | None, h_g: Tensor | None, u: Tensor, x: Tensor, g: Tensor, kappa_row: float, kappa_col: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of sum(h_x * grad_x) + sum(h_g * grad_g) with respect to u, x and g.

    ``grad_x`` and ``grad_g`` are what `flow_gradient_penalty_gradient` returns; None stands for zeros. The sum is u
    times the derivative of the penalty along (h_x, h_g).
    """
    dtype = accumulator(x, g)
    images, upstream, scale = x.to(dtype), g.to(dtype), 2 * u.to(dtype).view(-1, 1, 1, 1)
    h_images = torch.zeros_like(images) if h_x is None else h_x.to(dtype)
    h_upstream = torch.zeros_like(images) if h_g is None else h_g.to(dtype)
    grad_u, grad_x, grad_g = torch.zeros_like(u), torch.zeros_like(images), torch.zeros_like(images)
    for dim, kappa in ((2, kappa_row), (3, kappa_col)):
        difference, h_difference = _difference(images, dim), _difference(h_images, dim)
        here, h_here = _before(upstream, dim), _before(h_upstream, dim)
        slope = (here * difference).sum(1, keepdim=True)
        h_slope = (h_here * difference + here * h_difference).sum(1, keepdim=True)
        grad_u = grad_u + 2 * kappa**2 * (slope * h_slope).sum((1, 2, 3))
        a, b = scale * kappa**2 * h_slope, scale * kappa**2 * slope
        moved = a * here + b * h_here
        _before(grad_g, dim).add_(a * difference + b * h_difference)
        _before(grad_x, dim).sub_(moved)
        _after(grad_x, dim).add_(moved)
    return grad_u.to(u.dtype), grad_x.to(x.dtype), grad_g.to(g.dtype)


def flow_smoothness(flow: Tensor, neighbours: str) -> tuple[Tensor, Tensor]:
    """Returns the smoothness (N,) and its gradient (N, 2, H, W) with respect to flow."""
    dtype = accumulator(flow)
    value, gradient = torch.zeros(len(flow), dtype=dtype, device=flow.device), torch.empty_like(flow)
    for part in _parts(flow):
        field = flow[part].to(dtype)
        slopes = torch.zeros_like(field)
        for (one, other), (grad_one, grad_other) in zip(
            _pairs(field, neighbours), _pairs(slopes, neighbours), strict=True
        ):
            difference = other - one
            root = difference.square().sum(1, keepdim=True).add_(SOFTENING).sqrt_()
            value[part] += root.sum((1, 2, 3)).mul_(2)
            pull = difference.div_(root).mul_(2)
            grad_other.add_(pull)
            grad_one.sub_(pull)
        gradient[part] = slopes
    return value, gradient


def flow_smoothness_gradient_backward(h: Tensor, flow: Tensor, neighbours: str) -> Tensor:
    """Returns the gradient of sum(h * gradient) with respect to flow, gradient being that of `flow_smoothness`."""
    field, along = (tensor.to(accumulator(flow)) for tensor in (flow, h))
    out = torch.zeros_like(field)
    for pair, h_pair, (out_one, out_other) in zip(
        _pairs(field, neighbours), _pairs(along, neighbours), _pairs(out, neighbours), strict=True
    ):
        difference, h_difference = pair[1] - pair[0], h_pair[1] - h_pair[0]
        root = (difference.square().sum(1, keepdim=True) + SOFTENING).sqrt()
        cosine = (difference * h_difference).sum(1, keepdim=True) / root.square()
        pull = 2 * (h_difference - difference * cosine) / root
        out_other.add_(pull)
        out_one.sub_(pull)
    return out.to(flow.dtype)


def _parts(batch: Tensor) -> list[slice]:
    """Returns slices of whole samples, of about `CHUNK` values each."""
    samples = max(1, CHUNK // max(1, batch.shape[1:].numel()))
    return [slice(start, start + samples) for start in range(0, len(batch), samples)]


def _taps(flow: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Returns where the four corners around p + flow(p) lie, and how far below and right of the first of them.

    Returns:
        The corners' indices into an image's H*W pixels: upper left, upper right, lower left, lower right, each
        (N, 1, H*W); the weight of the lower ones and the weight of the right ones, each (N, 1, H*W).
    """
    n, _, height, width = flow.shape
    upper, lower, down = _neighbours(flow[:, 0], height, 2)
    left, right, along = _neighbours(flow[:, 1], width, 3)
    corners = [(row * width + col).long().reshape(n, 1, -1) for row in (upper, lower) for col in (left, right)]
    return corners, down.reshape(n, 1, -1), along.reshape(n, 1, -1)


def _neighbours(offset: Tensor, size: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns along one axis of the images both neighbours of position + offset, and the weight of the second.

    The weight is a fraction of the offset alone: adding the position first would round an offset just below zero to
    zero, or one at zero to just below, and take the difference on the wrong side. A point outside has two equal
    neighbours, and so no slope. NaN stays in the weight.
    """
    # index arithmetic is several times faster in int32, wherever the pixels can be counted in it
    pixels = offset.shape[1] * offset.shape[2]
    counter = torch.int32 if pixels < 2**31 else torch.int64
    position = torch.arange(size, dtype=counter, device=offset.device).view(-1, *[1] * (3 - dim))
    offset = offset.clamp(-size, size)
    whole = offset.detach().floor().nan_to_num_(0.0)
    weight = offset - whole
    first = whole.to(counter).add_(position)
    second = (first + 1).clamp_(0, size - 1)
    return first.clamp_(0, size - 1), second, weight


def _gather(x: Tensor, indices: list[Tensor]) -> list[Tensor]:
    """Returns for each index its pixels of x, (N, C, H*W)."""
    flat = x.flatten(2)
    return [flat.gather(2, index.expand(flat.shape)) for index in indices]


def _scatter(values: tuple[Tensor, ...], indices: list[Tensor]) -> Tensor:
    """Returns (N, C, H*W): each value added to its pixel, the adjoint of `_gather`."""
    out = torch.zeros_like(values[0])
    for value, index in zip(values, indices, strict=True):
        out = out.scatter_add_(2, index.expand(value.shape), value)
    return out


def _slopes(corners: list[Tensor], down: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the derivatives of the sampled image along rows and along columns."""
    upper_left, upper_right, lower_left, lower_right = corners
    by_row = torch.lerp(lower_left - upper_left, lower_right - upper_right, right)
    by_col = torch.lerp(upper_right - upper_left, lower_right - lower_left, down)
    return by_row, by_col


def _before(x: Tensor, dim: int) -> Tensor:
    """Returns the pixels that have a next one along dim."""
    return x.narrow(dim, 0, x.shape[dim] - 1)


def _after(x: Tensor, dim: int) -> Tensor:
    """Returns the pixels that have a previous one along dim."""
    return x.narrow(dim, 1, x.shape[dim] - 1)


def _difference(x: Tensor, dim: int) -> Tensor:
    """Returns x(p + 1) - x(p) along dim, without the last p, where the edge clamp makes it zero."""
    return _after(x, dim) - _before(x, dim)


def _pairs(field: Tensor, neighbours: str) -> list[tuple[Tensor, Tensor]]:
    """Returns all neighbouring pixels, each pair once, as views of the field."""
    if neighbours == "diagonal":
        falling = (field[:, :, :-1, :-1], field[:, :, 1:, 1:])
        rising = (field[:, :, :-1, 1:], field[:, :, 1:, :-1])
        return [falling, rising]
    return [(_before(field, dim), _after(field, dim)) for dim in (2, 3)]
