"""Separable windows: box sums by additions alone, and Gaussian smoothing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class _BoxSum(torch.autograd.Function):
    """The zero-padded sum over a cubic window. It is its own adjoint, so nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, window: int) -> Tensor:
        ctx.window = window  # type: ignore[attr-defined]
        for dim in (2, 3, 4):
            x = _sliding_sum(x, dim, window)
        return x

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return box_sum(grad, ctx.window), None  # type: ignore[attr-defined]


def box_sum(x: Tensor, window: int) -> Tensor:
    """The sum of ``x`` (B, C, I, J, K) over a cube of odd side ``window`` around each voxel, zeros outside.

    Sums of 1, 2, 4, ... neighbours are formed by doubling, about ``2 log2(window)`` additions a voxel and dimension.
    Nothing is ever subtracted: a running sum that adds and subtracts loses all digits next to an empty background.
    """
    out: Tensor = _BoxSum.apply(x, window)
    return out


def _sliding_sum(x: Tensor, dim: int, window: int) -> Tensor:
    size, radius = x.shape[dim], window // 2
    padding = [0] * (2 * (x.ndim - dim))
    padding[-1] = padding[-2] = radius
    run = F.pad(x, padding)  # sums of `span` neighbours, starting at each position
    total: Tensor | None = None
    start, span, left = 0, 1, window
    while left:
        if left & 1:
            part = run.narrow(dim, start, size)
            total = part if total is None else total + part
            start += span
        left >>= 1
        if left:
            length = run.shape[dim] - span
            run = run.narrow(dim, 0, length) + run.narrow(dim, span, length)
            span *= 2
    assert total is not None
    return total


def gaussian_kernel(sigma: float, radius: int, like: Tensor) -> Tensor:
    """Samples of a Gaussian of ``sigma`` voxels at -radius..radius, summing to one, on the device of ``like``."""
    offset = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    return (kernel / kernel.sum()).to(like.device, like.dtype)


def convolve(x: Tensor, kernel: Tensor, dim: int, mode: str = "replicate") -> Tensor:
    """``x`` (B, C, I, J, K) convolved with an odd symmetric ``kernel`` along ``dim``; edges padded by ``mode``."""
    radius = (kernel.numel() - 1) // 2
    if radius == 0:
        return x * kernel[0]
    padding = [0] * 6
    padding[2 * (4 - dim)] = padding[2 * (4 - dim) + 1] = radius
    padded = F.pad(x, padding, mode=mode)
    size = x.shape[dim]
    total = padded.narrow(dim, radius, size) * kernel[radius]
    for offset in range(1, radius + 1):
        pair = padded.narrow(dim, radius - offset, size) + padded.narrow(dim, radius + offset, size)
        total = total + kernel[radius + offset] * pair
    return total


def gaussian_smooth(x: Tensor, sigma: tuple[float, float, float], truncate: float = 3.0) -> Tensor:
    """``x`` (B, C, I, J, K) smoothed by a Gaussian of ``sigma`` voxels along each dimension, edges replicated."""
    for dim, width in enumerate(sigma, start=2):
        radius = math.ceil(truncate * width)
        if width > 0 and radius > 0:
            x = convolve(x, gaussian_kernel(width, radius, x), dim)
    return x
