"""Mutual information on the fused kernels, as operators that torch knows.

The images are read three times for a value with a gradient: for their ranges, for the joint histogram, and for the
gradient, which is formed from the slopes of the value with every count of the histogram. Nothing of volume size is kept.

Sums are formed in an order that does not depend on the number of threads (CPU) or as integers (GPU), so that the same
images give the same bits every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchreg.ops import cpu
from patchreg.ops.cuda import launch
from patchreg.ops.mutual_information import cuda

Range = tuple[float, float] | None


def mutual_information(
    fixed: Tensor,
    moving: Tensor,
    bins: int,
    mask: Tensor | None,
    window: str,
    normalized: bool,
    fixed_range: Range,
    moving_range: Range,
) -> Tensor:
    """See :func:`patchreg.ops.mutual_information`."""
    dtype = torch.promote_types(fixed.dtype, moving.dtype)
    weight = None
    if mask is not None:
        weight = (mask[:1] if mask.stride(0) == 0 else mask).to(dtype)
    ends = [*(fixed_range or (math.nan, math.nan)), *(moving_range or (math.nan, math.nan))]
    gaussian = window == "gaussian"
    values, _, _ = joint_information(fixed.to(dtype), moving.to(dtype), weight, bins, gaussian, normalized, ends)
    return values.mean()


@torch.library.custom_op("patchreg::mutual_information", mutates_args=())
def joint_information(
    fixed: Tensor,
    moving: Tensor,
    weight: Tensor | None,
    bins: int,
    gaussian: bool,
    normalized: bool,
    ends: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """The value of every pair of images, and what its gradient is made of.

    Args:
        fixed: (B, C, I, J, K).
        moving: the same shape and dtype.
        weight: (B, 1, I, J, K) or (1, 1, I, J, K) of that dtype; what is negative counts as 0.
        bins: of each image's histogram.
        gaussian: the window of half a bin, instead of the cubic B-spline.
        normalized: the ratio of entropies instead of their difference.
        ends: lowest and highest intensity of ``fixed``, of ``moving``; NaN where they are to be measured.

    Returns:
        values: (B, C), float32. Where no voxel has a weight: 0, or 1 where normalised, and no slope.
        slopes: (B, C, bins, bins), float32: d(value) / d(count).
        ranges: (B, C, 4), float64: ``ends`` as given or found.
    """
    fixed, moving, weight = _contiguous(fixed, moving, weight)
    if launch.use_cuda(fixed):
        return cuda.joint_information(fixed, moving, weight, bins, gaussian, normalized, ends)
    values, slopes, ranges = _outputs(fixed, bins)
    ranges.copy_(torch.tensor(ends, dtype=torch.float64))
    cpu.extension().mutual_information(
        *(cpu.address(t) for t in (fixed, moving, weight, ranges, values, slopes)),
        *_sizes(fixed, weight),
        cpu.STORAGE[fixed.dtype],
        bins,
        gaussian,
        normalized,
        cpu.threads(),
    )
    return values, slopes, ranges


@torch.library.custom_op("patchreg::mutual_information_gradients", mutates_args=())
def gradients(
    upstream: Tensor,
    slopes: Tensor,
    ranges: Tensor,
    fixed: Tensor,
    moving: Tensor,
    weight: Tensor | None,
    gaussian: bool,
    to_fixed: bool,
    to_moving: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients to the images, for an upstream gradient (B, C) of the values; one that is not wanted is empty."""
    fixed, moving, weight = _contiguous(fixed, moving, weight)
    upstream, slopes, ranges = upstream.float().contiguous(), slopes.contiguous(), ranges.contiguous()
    grad_fixed, grad_moving = (
        torch.empty_like(image) if wanted else None for image, wanted in ((fixed, to_fixed), (moving, to_moving))
    )
    bins = slopes.shape[-1]
    if launch.use_cuda(fixed):
        cuda.gather_gradients(fixed, moving, weight, ranges, slopes, upstream, grad_fixed, grad_moving, gaussian)
    else:
        tensors = (fixed, moving, weight, ranges, slopes, upstream, grad_fixed, grad_moving)
        cpu.extension().mutual_information_backward(
            *(cpu.address(t) for t in tensors),
            *_sizes(fixed, weight),
            cpu.STORAGE[fixed.dtype],
            bins,
            gaussian,
            cpu.threads(),
        )
    first, second = (fixed.new_empty(0) if grad is None else grad for grad in (grad_fixed, grad_moving))
    return first, second


def _contiguous(fixed: Tensor, moving: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return fixed.contiguous(), moving.contiguous(), None if weight is None else weight.contiguous()


def _outputs(fixed: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs = fixed.shape[:2]
    values = fixed.new_empty(pairs, dtype=torch.float32)
    slopes = fixed.new_empty((*pairs, bins, bins), dtype=torch.float32)
    return values, slopes, fixed.new_empty((*pairs, 4), dtype=torch.float64)


def _sizes(fixed: Tensor, weight: Tensor | None) -> tuple[int, int, int, bool]:
    """Pairs, channels, voxels, and whether every one of the batch has its own weight."""
    pairs, channels = fixed.shape[0] * fixed.shape[1], fixed.shape[1]
    return pairs, channels, fixed[0, 0].numel(), weight is not None and weight.shape[0] > 1


@joint_information.register_fake
def _(
    fixed: Tensor,
    moving: Tensor,
    weight: Tensor | None,
    bins: int,
    gaussian: bool,
    normalized: bool,
    ends: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(fixed, bins)


@gradients.register_fake
def _(
    upstream: Tensor,
    slopes: Tensor,
    ranges: Tensor,
    fixed: Tensor,
    moving: Tensor,
    weight: Tensor | None,
    gaussian: bool,
    to_fixed: bool,
    to_moving: bool,
) -> tuple[Tensor, Tensor]:
    first, second = (
        image.new_empty(image.shape) if wanted else image.new_empty(0)
        for image, wanted in ((fixed, to_fixed), (moving, to_moving))
    )
    return first, second


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    fixed, moving, weight, _, gaussian, _, _ = inputs
    _, slopes, ranges = output
    ctx.save_for_backward(fixed, moving, weight, slopes, ranges)
    ctx.mark_non_differentiable(slopes, ranges)
    ctx.gaussian = gaussian


def _differentiate(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    fixed, moving, weight, slopes, ranges = ctx.saved_tensors
    to_fixed, to_moving = ctx.needs_input_grad[:2]
    grads = gradients(upstream, slopes, ranges, fixed, moving, weight, ctx.gaussian, to_fixed, to_moving)
    grad_fixed, grad_moving = (
        grad if wanted else None for grad, wanted in zip(grads, (to_fixed, to_moving), strict=True)
    )
    return grad_fixed, grad_moving, None, None, None, None, None


joint_information.register_autograd(_differentiate, setup_context=_keep)
