"""Mutual information from histograms that are added up over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.ops.dispatch import is_native
from patchreg.ops.mutual_information import native, reference
from patchreg.types import Backend


@dataclass(frozen=True)
class Histogram:
    """How intensities are counted; see :func:`patchreg.ops.mutual_information`."""

    bins: int
    window: str
    normalized: bool
    fixed_range: tuple[float, float] | None
    moving_range: tuple[float, float] | None
    backend: Backend

    def count(self, fixed: Tensor, moving: Tensor, weight: Tensor | None, ends: Tensor) -> Tensor:
        """Some voxels' joint histogram, (bins, bins): images (N,), weights (N,), lowest and highest intensities (4,)."""
        I, J = (
            reference.bin_coordinate(x, self.bins, (low, high))  # type: ignore[arg-type]
            for x, low, high in ((fixed, ends[0], ends[1]), (moving, ends[2], ends[3]))
        )
        with torch.autocast(fixed.device.type, enabled=False):
            return reference.histogram(I, J, weight, self.bins, self.window)


def information(
    fixed: Tensor, moving: Tensor, weight: Tensor | None, histogram: Histogram, group: dist.ProcessGroup
) -> Tensor:
    """The mean over batch and channels, a float64 scalar, common.

    Args:
        fixed: this rank's slab, (B, C, I, J, K).
        moving: likewise.
        weight: (B, 1, I, J, K) or (1, 1, I, J, K), of the dtype that is computed in.
        histogram: how.
        group: the ranks.
    """
    out: Tensor = _Information.apply(fixed, moving, weight, histogram, group)
    return out


class _Information(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fixed: Tensor, moving: Tensor, weight: Tensor | None, histogram: Histogram, group: dist.ProcessGroup
    ) -> Tensor:
        ends = _ends(fixed, moving, histogram, group)
        counts = fixed.new_zeros((*fixed.shape[:2], histogram.bins, histogram.bins), dtype=torch.float64)
        for (b, c), I, J, w in _slices(fixed, moving, weight):
            counts[b, c] += histogram.count(I, J, w, ends[b, c].to(I.dtype))
        comm.reduce_all(counts, "sum", group)
        with torch.enable_grad():
            counts.requires_grad_()
            values = [_value(pair, histogram.normalized) for pair in counts.flatten(0, 1)]
            value = torch.stack(values).mean()
        (slopes,) = torch.autograd.grad(value, counts)
        ctx.save_for_backward(fixed, moving, weight, slopes, ends)
        ctx.histogram = histogram
        return value.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        fixed, moving, weight, slopes, ends = ctx.saved_tensors
        histogram, wanted = ctx.histogram, ctx.needs_input_grad[:2]
        if fixed.numel() == 0:
            grads = [torch.zeros_like(fixed), torch.zeros_like(moving)]
        elif is_native("mutual_information", histogram.backend, fixed, moving):
            dtype = torch.promote_types(fixed.dtype, moving.dtype)
            images = fixed.to(dtype), moving.to(dtype), None if weight is None else weight.to(dtype)
            each = upstream.expand(slopes.shape[:2])
            grads = list(native.gradients(each, slopes.float(), ends, *images, histogram.window == "gaussian", *wanted))
        else:
            grads = _differentiate(fixed, moving, weight, histogram, slopes * upstream, ends)
        to_fixed, to_moving = (
            grad.to(image.dtype) if wants else None
            for grad, image, wants in zip(grads, (fixed, moving), wanted, strict=True)
        )
        return to_fixed, to_moving, None, None, None


def _ends(fixed: Tensor, moving: Tensor, histogram: Histogram, group: dist.ProcessGroup) -> Tensor:
    """Lowest and highest intensity of both images, given or found on all ranks, (B, C, 4) float64."""
    found = []
    for image, limits in ((fixed, histogram.fixed_range), (moving, histogram.moving_range)):
        if limits is not None:
            low, high = (image.new_full(image.shape[:2], end, dtype=torch.float64) for end in limits)
        elif image.numel():
            low, high = (end.double() for end in image.flatten(2).aminmax(dim=2))
        else:
            low, high = (image.new_full(image.shape[:2], end, dtype=torch.float64) for end in (math.inf, -math.inf))
        found += [-low, high]
    ends = torch.stack(found, dim=2)
    if histogram.fixed_range is None or histogram.moving_range is None:
        comm.reduce_all(ends, "max", group)
    return ends * ends.new_tensor([-1.0, 1.0, -1.0, 1.0])


def _value(counts: Tensor, normalized: bool) -> Tensor:
    total = counts.sum()
    return reference.information(counts / torch.where(total == 0, 1, total), normalized)


def _slices(
    fixed: Tensor, moving: Tensor, weight: Tensor | None
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor, Tensor | None]]:
    """Some voxels of a pair of images after the other, with their place in the batch, in the dtype to compute in."""
    dtype = torch.promote_types(fixed.dtype, torch.float32)
    for b in range(fixed.shape[0]):
        w = None if weight is None else weight[b % weight.shape[0], 0].flatten()
        for c in range(fixed.shape[1]):
            I, J = fixed[b, c].flatten(), moving[b, c].flatten()
            for start in range(0, I.numel(), reference.SLICE):
                part = slice(start, start + reference.SLICE)
                yield (b, c), I[part].to(dtype), J[part].to(dtype), None if w is None else w[part]


def _differentiate(
    fixed: Tensor, moving: Tensor, weight: Tensor | None, histogram: Histogram, slopes: Tensor, ends: Tensor
) -> list[Tensor]:
    """The gradients from the slopes with every count, by the reference."""
    grads = [torch.empty(image.shape, dtype=image.dtype, device=image.device) for image in (fixed, moving)]
    places = [[grad[b, c].view(-1) for b in range(fixed.shape[0]) for c in range(fixed.shape[1])] for grad in grads]
    done = [0] * len(places[0])
    for (b, c), I, J, w in _slices(fixed, moving, weight):
        with torch.enable_grad():
            counts = histogram.count(I.requires_grad_(), J.requires_grad_(), w, ends[b, c].to(I.dtype))
        pair = b * fixed.shape[1] + c
        part = slice(done[pair], done[pair] + I.numel())
        for place, grad in zip(places, torch.autograd.grad(counts, (I, J), slopes[b, c].to(I.dtype)), strict=True):
            place[pair][part] = grad
        done[pair] = part.stop
    return grads
