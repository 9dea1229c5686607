"""A convolution of features that linear interpolation upsamples, which never makes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.networks.espcn import voxel_shuffle
from patchreg.ops.precision import full_precision

# [phase, coarse tap, fine tap]: how the three fine voxels around an even (odd) fine voxel are made of three coarse ones
_LINEAR = (
    ((0.75, 0.25, 0.0), (0.25, 0.75, 0.75), (0.0, 0.0, 0.25)),
    ((0.25, 0.0, 0.0), (0.75, 0.75, 0.25), (0.0, 0.25, 0.75)),
)


def conv_upsampled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``conv3d(upsample(x), weight, padding=1)``, where ``upsample`` is trilinear and doubles the resolution.

    Each of the eight voxels that a voxel becomes is a 3x3x3 convolution of the coarse features, with a kernel that is
    linear in ``weight``; so a convolution to eight times the channels, whose answers are put in their places, is the
    same up to rounding. It takes as many multiplications, and nothing of the fine resolution with the channels of ``x``
    exists, now or in the backward pass. Only at the border is it as if the volume went on, which is subtracted there.

    Args:
        x: (B, C, I, J, K).
        weight: (c, C, 3, 3, 3).

    Returns:
        (B, c, 2I, 2J, 2K).

    References:
        Shi et al. 2016, arXiv:1609.05158, section 2.2, for convolutions at the coarse resolution.
    """
    faces = [(dim, end, _beyond(x, weight, dim, end)) for dim in (2, 3, 4) for end in (0, -1)]
    out = F.conv3d(F.pad(x, (1,) * 6, mode="replicate"), _kernel(weight))  # the last to keep: it need not run again
    out = voxel_shuffle(out, 2)
    for dim, end, face in faces:
        out = _SubtractFace.apply(out, face, dim, end)
    return out


def _beyond(x: Tensor, weight: Tensor, dim: int, end: int) -> Tensor:
    """What the first (0) or last (-1) voxels along ``dim`` would be given by those beyond the border.

    Along the axes before ``dim`` there are zeros beyond the border already, along those after it the volume goes on.
    """
    face = F.interpolate(x.select(dim, end), scale_factor=2, mode="bilinear", align_corners=False)
    a, b = (int(axis > dim) for axis in (2, 3, 4) if axis != dim)
    face = F.pad(face, (b, b, a, a), mode="replicate")
    return F.conv2d(face, weight.select(dim, end), padding=(1 - a, 1 - b))


@full_precision
def _kernel(weight: Tensor) -> Tensor:
    """(c, C, 3, 3, 3) to (8c, C, 3, 3, 3), the phases as the last of the output's indices."""
    linear = weight.new_tensor(_LINEAR)
    return torch.einsum("xai,ybj,zck,oqijk->oxyzqabc", linear, linear, linear, weight).flatten(0, 3)


class _SubtractFace(torch.autograd.Function):
    """``x[first or last along dim] -= face``, in place, without the copies of ``x`` that autograd would make."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, face: Tensor, dim: int, end: int) -> Tensor:
        ctx.dim, ctx.end = dim, end
        ctx.mark_dirty(x)
        x.select(dim, end).sub_(face)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, -grad.select(ctx.dim, ctx.end), None, None
