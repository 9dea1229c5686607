"""Mutual information of two images."""

from __future__ import annotations

from torch import Tensor

from patchreg.errors import InputError
from patchreg.ops import checks
from patchreg.ops.dispatch import choose
from patchreg.ops.mutual_information import reference
from patchreg.types import Backend


def mutual_information(
    fixed: Tensor,
    moving: Tensor,
    bins: int = 32,
    mask: Tensor | None = None,
    window: str = "bspline",
    normalized: bool = False,
    fixed_range: tuple[float, float] | None = None,
    moving_range: tuple[float, float] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mutual information from a joint Parzen histogram, in nats; larger is more similar.

    Args:
        fixed: (B, C, I, J, K).
        moving: the same shape.
        bins: of each image's histogram, at least 8.
        mask: (B, 1, I, J, K) or (1, 1, I, J, K), a weight for every voxel.
        window: the Parzen window of both images: ``"bspline"`` (cubic) or ``"gaussian"`` (half a bin).
        normalized: return ``(H(I) + H(J)) / H(I, J)``, from 1 (independent) to 2 (equal), instead.
        fixed_range: intensities of the first and last bin. None: those of each image, without a gradient to them.
        moving_range: the same for ``moving``. Intensities outside a range count as its end.
        backend: see :mod:`patchreg.ops`.

    Returns:
        A scalar: the mean over batch and channels.

    Raises:
        InputError: shapes, dtypes or devices that do not match, too few bins, an empty mask or range.

    References:
        Mattes et al. 2003, doi:10.1109/TMI.2002.803888, eq. (7) to (11), with a cubic window for both images so that
        either may be differentiated; Studholme et al. 1999, doi:10.1016/S0031-3203(98)00091-0, eq. (12).
    """
    checks.volume("fixed", fixed)
    checks.volume("moving", moving)
    checks.same_shape("fixed", fixed, "moving", moving)
    if bins < 8:
        raise InputError(f"bins must be at least 8, got {bins}")
    if window not in ("bspline", "gaussian"):
        raise InputError(f"window must be 'bspline' or 'gaussian', got {window!r}")
    for name, limits in (("fixed_range", fixed_range), ("moving_range", moving_range)):
        if limits is not None and not limits[0] < limits[1]:
            raise InputError(f"{name} must be (low, high) with low < high, got {limits}")
    if mask is not None:
        mask = checks.broadcast_mask("mask", mask, fixed)
    function = choose("mutual_information", backend, reference.mutual_information, None)
    return function(fixed, moving, bins, mask, window, normalized, fixed_range, moving_range)
