"""Mutual information of two images."""

from __future__ import annotations

import torch
from torch import Tensor

from patchreg.errors import InputError, NoGradient
from patchreg.ops import checks
from patchreg.ops.dispatch import is_native
from patchreg.ops.mutual_information import native, reference
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

    The kernels give the same bits every time, whatever the number of threads or the order in which a GPU does its work:
    there is no faster way that is not deterministic.

    Args:
        fixed: (B, C, I, J, K).
        moving: the same shape.
        bins: of each image's histogram, 8 to 1024.
        mask: (B, 1, I, J, K) or (1, 1, I, J, K), a weight for every voxel, without a gradient. A mask that is empty raises,
            except in a graph that is traced or captured: there its value is 0 (1 if normalised), its gradient zero.
        window: the Parzen window of both images: ``"bspline"`` (cubic) or ``"gaussian"`` (half a bin).
        normalized: return ``(H(I) + H(J)) / H(I, J)``, from 1 (independent) to 2 (equal), instead.
        fixed_range: intensities of the first and last bin. None: those of each image, without a gradient to them.
        moving_range: the same for ``moving``. Intensities outside a range count as its end, and have no gradient. An image
            of one intensity only has none either.
        backend: see :mod:`patchreg.ops`.

    Returns:
        A scalar: the mean over batch and channels, float32 for half precision inputs. NaN where an image has one.

    Raises:
        InputError: shapes, dtypes or devices that do not match, too few or many bins, an empty or negative mask, an empty
            range.
        NoGradient: a gradient to the mask was asked for.
        BackendUnavailable: ``backend="native"`` where no kernel can run.

    References:
        Mattes et al. 2003, doi:10.1109/TMI.2002.803888, eq. (7) to (11), with a cubic window for both images so that
        either may be differentiated; Studholme et al. 1999, doi:10.1016/S0031-3203(98)00091-0, eq. (12).
    """
    checks.volume("fixed", fixed)
    checks.volume("moving", moving)
    checks.same_shape("fixed", fixed, "moving", moving)
    if not 8 <= bins <= 1024:
        raise InputError(f"bins must be at least 8 and at most 1024, got {bins}")
    if window not in ("bspline", "gaussian"):
        raise InputError(f"window must be 'bspline' or 'gaussian', got {window!r}")
    for name, limits in (("fixed_range", fixed_range), ("moving_range", moving_range)):
        if limits is not None and not limits[0] < limits[1]:
            raise InputError(f"{name} must be (low, high) with low < high, got {limits}")
    if mask is not None:
        if mask.requires_grad and torch.is_grad_enabled():
            raise NoGradient("mutual_information has no gradient to the mask: detach it")
        mask = checks.broadcast_mask("mask", mask, fixed, weights=True)
    implementation = native if is_native("mutual_information", backend, fixed, moving) else reference
    return implementation.mutual_information(fixed, moving, bins, mask, window, normalized, fixed_range, moving_range)
