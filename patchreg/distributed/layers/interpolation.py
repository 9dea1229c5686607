"""Interpolation to another size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.partition import Span
from patchreg.distributed.scope import Scope
from patchreg.errors import UnsupportedSharding

LINEAR = {"nearest": "nearest", "nearest-exact": "nearest-exact", "trilinear": "linear"}
"""The interpolations, and what they are along one axis."""


def interpolate(
    x: Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    *,
    scope: Scope,
    total: int,
) -> Tensor:
    """``F.interpolate`` on slabs.

    Along the split dimension planes are mixed first, then along the others.

    Args:
        x: this rank's part of a tensor (B, C, I, J, K) with ``total`` planes.
        size: of the whole output.
        scale_factor: output for input, along each axis or all.
        mode: ``"nearest"``, ``"nearest-exact"`` or ``"trilinear"``.
        align_corners: as in ``F.interpolate``.
        recompute_scale_factor: the same.
        scope: says how tensors are split.
        total: see ``x``.

    Returns:
        This rank's part of the output.

    Raises:
        UnsupportedSharding: another mode.
    """
    if mode not in LINEAR:
        raise UnsupportedSharding(f"interpolation mode {mode!r} does not run on slabs: take one of {', '.join(LINEAR)}")
    shape = [total if d == scope.dim else n for d, n in enumerate(x.shape)][2:]
    factors = _each(scale_factor)
    if recompute_scale_factor and factors is not None:
        size, factors = [math.floor(n * f) for n, f in zip(shape, factors, strict=True)], None
    sizes = _each(size)
    axis = scope.dim - 2
    if sizes is None:
        assert factors is not None
        out_total, factor = math.floor(total * factors[axis]), factors[axis]
        others = {"scale_factor": [1.0 if d == axis else f for d, f in enumerate(factors)]}
    else:
        out_total, factor = int(sizes[axis]), None
    x = _along(x, out_total, factor, mode, align_corners, scope, total)
    if sizes is not None:
        others = {"size": [x.shape[scope.dim] if d == axis else int(n) for d, n in enumerate(sizes)]}
    return F.interpolate(x, mode=mode, align_corners=align_corners, **others)  # type: ignore[arg-type]


def _each(value: float | Sequence[float] | None) -> list[float] | None:
    if value is None:
        return None
    return [value] * 3 if isinstance(value, (int, float)) else list(value)


def _along(
    x: Tensor, out_total: int, factor: float | None, mode: str, align_corners: bool | None, scope: Scope, total: int
) -> Tensor:
    """Of the split dimension alone."""
    places = _sources(total, out_total, factor, LINEAR[mode], align_corners, x.dtype == torch.float64)
    reads = [_read(places, span) for span in scope.spans(out_total)]
    x = scope.bring(x, total, reads)
    (low, high), (first, end) = scope.span(out_total), reads[scope.rank]
    at = [place - first for place in places[low:high]]
    below = [math.floor(place) for place in at]
    shares = [place - lower for place, lower in zip(at, below, strict=True)]
    if list(places) == list(range(total)):  # not what holds for this rank alone: all must do the same
        return x
    lower = x.index_select(scope.dim, torch.tensor(below, device=x.device))
    if all(place == math.floor(place) for place in places):
        return lower
    upper = x.index_select(scope.dim, torch.tensor([min(n + 1, end - first - 1) for n in below], device=x.device))
    return torch.lerp(lower, upper, x.new_tensor(shares).view(-1, *[1] * (4 - scope.dim)))


def _read(places: Sequence[float], outputs: Span) -> Span:
    own = places[slice(*outputs)]
    return math.floor(min(own)), math.ceil(max(own)) + 1


@lru_cache(maxsize=256)
def _sources(
    total: int, out_total: int, factor: float | None, mode: str, align_corners: bool | None, double: bool
) -> tuple[float, ...]:
    """Where each output plane is among the input's, just as torch rounds it: it interpolates the planes' numbers."""
    # nearest planes depend on the rounding of the type; between planes the finer number serves all
    dtype = torch.float64 if double or mode == "linear" else torch.float32
    planes = torch.arange(total, dtype=dtype).view(1, 1, -1)
    how = {"size": out_total} if factor is None else {"scale_factor": factor}
    found = F.interpolate(planes, mode=mode, align_corners=align_corners, **how)
    return tuple(found.flatten().tolist())


@stands_for(nn.Upsample)
class ShardedUpsample(ShardedLayer, nn.Upsample):
    """``nn.Upsample``; its ``size`` is that of the whole volume."""

    def unsupported(self) -> str | None:
        return None if self.mode in LINEAR else f"has mode {self.mode!r}"

    def sharded(self, x: Tensor, *, scope: Scope, total: int) -> Tensor:  # type: ignore[override]
        return interpolate(
            x, self.size, self.scale_factor, self.mode, self.align_corners, self.recompute_scale_factor,
            scope=scope, total=total,
        )  # fmt: skip
