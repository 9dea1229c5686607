"""A convolution of features that nearest neighbours upsample, which never makes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.ops.precision import full_precision


def conv_upsampled_nearest(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv3d(upsample(x), weight, bias, padding=k // 2)``, where ``upsample`` repeats every voxel twice.

    Repeating voxels and then convolving is one transposed convolution of stride 2, whose kernel is the sum of ``weight``
    at its eight shifts by zero or one voxel. It is the same up to rounding, takes a third of the multiplications where
    k is 3, and nothing of the fine resolution with the channels of ``x`` exists, now or in the backward pass.

    Args:
        x: (B, C, I, J, K).
        weight: (c, C, k, k, k), k odd.
        bias: (c,).

    Returns:
        (B, c, 2I, 2J, 2K).
    """
    return F.conv_transpose3d(x, _kernel(weight), bias, stride=2, padding=weight.shape[-1] // 2)


@full_precision
def _kernel(weight: Tensor) -> Tensor:
    """(c, C, k, k, k) to (C, c, k + 1, k + 1, k + 1)."""
    shifts = [F.pad(weight, (i, 1 - i, j, 1 - j, k, 1 - k)) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    return torch.stack(shifts).sum(dim=0).flip(2, 3, 4).transpose(0, 1)
