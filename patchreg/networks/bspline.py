"""Cubic B-splines: a dense field from control points."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.ops import checks
from patchreg.types import Shape3


def control_shape(shape: Shape3, spacing: int) -> Shape3:
    """How many control points a field needs: one before its first voxel, and on to the second after its last.

    Args:
        shape: voxels of the field.
        spacing: of the control points, in voxels.
    """
    i, j, k = ((n - 1) // spacing + 4 for n in shape)
    return i, j, k


def dense_bspline(control: Tensor, spacing: int, shape: Shape3) -> Tensor:
    """``u(x) = sum_k B(x / s - k) c_k`` at every voxel, with the cubic B-spline ``B`` along each axis.

    It is a transposed convolution of stride ``s``, one axis after the other. The first control point lies ``s`` voxels
    before the first voxel. Constant and linear control points give constant and linear fields.

    Args:
        control: ``c``, (B, C, i, j, k), as many as :func:`control_shape` says.
        spacing: ``s``, in voxels.
        shape: voxels of the field.

    Returns:
        (B, C, *shape).

    Raises:
        InputError: not a volume.

    References:
        Rueckert et al. 1999, doi:10.1109/42.796284, eq. (2); Chen et al. 2022, arXiv:2111.10480 (TransMorph-bspl), and
        Qiu et al. 2021, MIDL, PMLR 143:645, for the transposed convolution.
    """
    checks.volume("control", control)
    channels = control.shape[1]
    for axis, size in enumerate(shape):
        along = [int(a == axis) for a in range(3)]
        kernel = _cubic(spacing, control).view([-1 if a else 1 for a in along]).expand(channels, 1, -1, -1, -1)
        stride = [spacing if a else 1 for a in along]
        padding = [(3 * spacing - 1) * a for a in along]  # from the kernel's first tap to the field's first voxel
        control = F.conv_transpose3d(control, kernel, stride=stride, padding=padding, groups=channels)
        control = control.narrow(2 + axis, 0, size)
    return control


def _cubic(spacing: int, like: Tensor) -> Tensor:
    """(4s - 1,): ``B`` at the multiples of ``1 / s`` where it is not zero."""
    t = (torch.arange(1 - 2 * spacing, 2 * spacing, device=like.device, dtype=like.dtype) / spacing).abs()
    return torch.where(t < 1, 2 / 3 - t**2 + t**3 / 2, (2 - t) ** 3 / 6)
