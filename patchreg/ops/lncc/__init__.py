"""Squared local normalised cross correlation."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from patchreg.errors import InputError
from patchreg.ops import checks
from patchreg.ops.dispatch import is_native
from patchreg.ops.lncc import native, reference
from patchreg.types import Backend, Memory, Reduction


def lncc(
    fixed: Tensor,
    moving: Tensor,
    window: int = 9,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    kernel: str = "box",
    memory: Memory = "stored",
    backend: Backend = "auto",
) -> Tensor:
    """Squared local normalised cross correlation over a window around each voxel; 1 is a perfect match, 0 none.

    With sums over the window of ``n = window**3`` voxels, zeros outside the volume::

        cross = sum(IJ) - sum(I) sum(J) / n        variance(I) = sum(II) - sum(I)**2 / n
        lncc  = cross**2 / (variance(I) variance(J) + eps)

    Where a variance is no larger than the rounding of the numbers that it is made of, the window counts as constant and
    its value, and gradient, is zero: constant regions of raw scanner intensities give no noise. The gradients are exact,
    to ``fixed``, ``moving`` or both.

    Extra memory, in volumes of float32: the native kernels need none for the value, and for a gradient keep one (two for
    both images) with ``memory="stored"``, none with ``"recompute"``, besides the gradient itself. The reference, which
    runs where no kernel can, keeps about 25.

    Args:
        fixed: ``I``, (B, C, I, J, K).
        moving: ``J``, the same shape.
        window: odd side of the window, in voxels.
        eps: added to the product of the variances.
        mask: (B, 1, I, J, K) or (1, 1, I, J, K); voxels where it is zero enter no window and no mean.
        reduction: ``"mean"`` over all (selected) voxels, ``"sum"``, or ``"none"`` for the map, of the shape of ``fixed``.
        kernel: ``"box"``, or ``"gaussian"`` with a standard deviation of ``window / 6`` voxels, scaled to sum to ``n``.
        memory: ``"stored"``: the forward pass makes the gradient as well, and keeps it; ``"recompute"``: it keeps nothing,
            and the backward pass goes over the images again (about 1.2 times as long in all). For the native kernels.
        backend: see :mod:`patchreg.ops`.

    Returns:
        A scalar, or the map, in float32 for half precision inputs.

    Raises:
        InputError: shapes, dtypes or devices that do not match, an even window, an empty mask.

    References:
        Avants et al. 2008, doi:10.1016/j.media.2007.06.004, eq. (6); Balakrishnan et al. 2019, arXiv:1809.05231,
        eq. (6), whose implementation this equals in value.
    """
    checks.volume("fixed", fixed)
    checks.volume("moving", moving)
    checks.same_shape("fixed", fixed, "moving", moving)
    if window < 1 or window % 2 == 0:
        raise InputError(f"window must be odd and positive, got {window}")
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if kernel not in ("box", "gaussian"):
        raise InputError(f"kernel must be 'box' or 'gaussian', got {kernel!r}")
    if memory not in get_args(Memory):
        raise InputError(f"memory must be one of {get_args(Memory)}, got {memory!r}")
    if mask is not None:
        mask = checks.broadcast_mask("mask", mask, fixed)
    if is_native("lncc", backend, fixed, moving):
        return native.lncc(fixed, moving, window, eps, mask, reduction, kernel, memory)
    return reference.lncc(fixed, moving, window, eps, mask, reduction, kernel)
