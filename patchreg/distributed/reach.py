"""How far a sampler reaches along the dimension that is split."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from patchreg.distributed.partition import Span, clip
from patchreg.ops.precision import full_precision
from patchreg.types import Padding, Shape3

SLACK = 0.01
"""Voxels by which positions in float32 may be off, here or in a kernel."""

VOXELS = 1 << 20
"""Voxels whose positions exist at one time."""


@torch.no_grad()
@full_precision
def read_planes(
    displacement: Tensor | None,
    affine: Tensor,
    scale: Tensor | float | None,
    shape: Shape3,
    dim: int,
    total: int,
    padding: Padding,
) -> Span:
    """The planes of an image that interpolation at ``A x + t + S u(x)`` reads, over all voxels ``x`` of a slab.

    Args:
        displacement: ``u``, (B, 3, *shape), or None.
        affine: ``[A | t]``, (B, 3, 4) float64, from voxels of the slab to voxels of the whole image.
        scale: ``S``, (B, 3, 3), a number, or None.
        shape: of the slab.
        dim: the dimension of the tensors that is split.
        total: planes of the image.
        padding: positions beyond the image need nothing with ``"zeros"``, its first or last plane with ``"border"``.
    """
    if 0 in shape:
        return 0, 0
    if displacement is None:
        row = affine[:, dim - 2]
        i, j, k = (torch.tensor([0.0, n - 1], dtype=row.dtype, device=row.device) for n in shape)
        low, high = (float(end) for end in _places(row, i, j, k).aminmax())  # of the corners
    else:
        low, high = _range(displacement, affine, scale, shape, dim, total, padding)
    if padding == "border":
        low, high = (0.0 if math.isnan(end) else min(max(end, 0.0), total - 1.0) for end in (low, high))
    if not low <= high:  # no voxel needs any, or no position is a number
        return 0, 0
    low, high = max(low, -2.0), min(high, total + 1.0)
    return clip((math.floor(low - SLACK), math.floor(high + SLACK) + 2), total)


def positions(
    displacement: Tensor | None, affine: Tensor, scale: Tensor | float | None, shape: Shape3, axis: int
) -> Iterator[tuple[slice, Tensor]]:
    """``A x + t + S u(x)`` along one axis, a few planes at a time: their place along dim 2, and (B, planes, J, K)."""
    dtype = affine.dtype if displacement is None else torch.promote_types(displacement.dtype, torch.float32)
    row = affine[:, axis].to(dtype)
    step = max(1, VOXELS // (shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        part = slice(start, min(start + step, shape[0]))
        i, j, k = (
            torch.arange(*ends, dtype=dtype, device=row.device) for ends in ((start, part.stop), shape[1:2], shape[2:])
        )
        at = _places(row, i, j, k)
        if displacement is not None:
            at = at + _component(displacement[:, :, part].to(dtype), scale, axis)
        yield part, at


def _range(
    displacement: Tensor,
    affine: Tensor,
    scale: Tensor | float | None,
    shape: Shape3,
    dim: int,
    total: int,
    padding: Padding,
) -> tuple[float, float]:
    """The lowest and highest position; with zeros beyond the image, of those that it has a value for."""
    ends = []
    for _, at in positions(displacement, affine, scale, shape, dim - 2):
        if padding == "zeros":
            reads = (at > -1 - SLACK) & (at < total + SLACK)
            ends.append(torch.stack([at.where(reads, torch.inf).amin(), at.where(reads, -torch.inf).amax()]))
        else:
            ends.append(torch.stack(at.nan_to_num(nan=0.0).aminmax()))
    lows, highs = torch.stack(ends).unbind(dim=1)
    low, high = torch.stack([lows.amin(), highs.amax()]).tolist()
    return low, high


def _component(u: Tensor, scale: Tensor | float | None, axis: int) -> Tensor:
    """``(S u)`` along one axis, (B, I, J, K)."""
    if isinstance(scale, Tensor):
        return torch.einsum("be,beijk->bijk", scale[:, axis].to(u.dtype), u)
    return u[:, axis] * (1.0 if scale is None else scale)


def _places(row: Tensor, i: Tensor, j: Tensor, k: Tensor) -> Tensor:
    """``A x + t`` along one axis, (B, I, J, K), of one row of ``[A | t]``, (B, 4)."""
    a, b, c, t = (row[:, n, None, None, None] for n in range(4))
    return a * i[:, None, None] + b * j[:, None] + c * k + t
