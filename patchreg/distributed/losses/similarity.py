"""How alike two split images are: :mod:`patchreg.ops` and :class:`patchreg.losses.MSE` on many ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchreg import ops
from patchreg.distributed import communication as comm
from patchreg.distributed.agreement import agreement
from patchreg.distributed.communication import Group
from patchreg.distributed.losses.arguments import check_pair, one_voxel, selected_counts, whole_numel
from patchreg.distributed.losses.information import Histogram, information
from patchreg.distributed.partition import Partition, Span
from patchreg.distributed.windowed import Term, windowed_sum
from patchreg.errors import InputError, NoGradient
from patchreg.ops.dispatch import is_native
from patchreg.ops.lncc import native, reference
from patchreg.types import Backend


def lncc(
    fixed: Tensor,
    moving: Tensor,
    partition: Partition,
    window: int = 9,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    kernel: str = "box",
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """The mean of :func:`patchreg.ops.lncc` over the whole volume.

    Half a window of planes comes from each side, as far away as it may be, and of each gradient as much goes back.
    Memory: the gradients, which are kept from the forward pass, one slab for each image that wants one, and what the
    operation makes of a part of the slab.

    Args:
        fixed: this rank's slab, (B, C, I, J, K).
        moving: likewise.
        partition: of both.
        window: see :func:`patchreg.ops.lncc`.
        eps: likewise.
        mask: this rank's slab of it, (B, 1, I, J, K) or (1, 1, I, J, K).
        kernel: likewise.
        backend: see :mod:`patchreg.ops`.
        group: the ranks.

    Returns:
        A scalar, the same on all ranks; float32 for half precision.

    Raises:
        InputError: as :func:`patchreg.ops.lncc`, slabs that are not the partition's, or ranks that disagree.
    """
    ranks = comm.process_group(group)
    with agreement("lncc", ranks) as facts:
        check_pair(facts, fixed, moving, mask, partition, ranks)
        facts.same(window=window, eps=eps, kernel=kernel, backend=backend)
        ops.lncc(one_voxel(fixed), one_voxel(moving), window, eps, kernel=kernel, backend=backend)
    images, count = [fixed, moving], float(whole_numel(fixed, partition))
    if mask is not None:
        images.append((mask > 0).to(torch.uint8))
        per_batch = selected_counts(images[2], ranks).expand(fixed.shape[0])
        count = float(per_batch.sum()) * fixed.shape[1]
    term: Term = _Correlation(partition.dim, window, eps, kernel, backend)
    value = windowed_sum(term, images, partition, (window // 2, window // 2), ranks) / count
    return value.to(torch.promote_types(fixed.dtype, torch.float32))


@dataclass(frozen=True)
class _Correlation:
    """The sum of squared correlations over some planes."""

    dim: int
    window: int
    eps: float
    kernel: str
    backend: Backend

    def __call__(self, *pieces: Tensor, core: Span) -> list[Tensor]:
        fixed, moving, *masks = pieces
        mask = masks[0].to(fixed.dtype).expand(fixed.shape[0], -1, -1, -1, -1) if masks else None
        if is_native("lncc", self.backend, fixed, moving):
            values = native.lncc(fixed, moving, self.window, self.eps, mask, "none", self.kernel, "recompute")
        else:
            values = reference.lncc(fixed, moving, self.window, self.eps, mask, "none", self.kernel)
        return [values.narrow(self.dim, core[0], core[1] - core[0]).sum(dtype=torch.float64)]


def mse(fixed: Tensor, moving: Tensor, partition: Partition, mask: Tensor | None = None, group: Group = None) -> Tensor:
    """The mean squared difference of whole volumes: :class:`patchreg.losses.MSE`.

    Args:
        fixed: this rank's slab, (B, C, I, J, K).
        moving: likewise.
        partition: of both.
        mask: this rank's slab of it, (B, 1, I, J, K) or (1, 1, I, J, K): weights.
        group: the ranks.

    Returns:
        A scalar, the same on all ranks; float32 for half precision.

    Raises:
        InputError: slabs that are not the partition's, or ranks that disagree.
    """
    ranks = comm.process_group(group)
    with agreement("mse", ranks) as facts:
        check_pair(facts, fixed, moving, mask, partition, ranks)
        if mask is not None and mask.requires_grad and torch.is_grad_enabled():
            raise NoGradient("mse has no gradient to the mask: detach it")
    images = [fixed, moving] if mask is None else [fixed, moving, mask]
    value = windowed_sum(_squared_difference, images, partition, (0, 0), ranks)
    if mask is None:
        value = value / whole_numel(fixed, partition)
    else:
        weights = mask.sum(dtype=torch.float64) * (fixed.shape[0] // mask.shape[0] * fixed.shape[1])
        value = value / comm.reduce_all(weights, "sum", ranks).clamp(min=1)
    return value.to(torch.promote_types(fixed.dtype, torch.float32))


def _squared_difference(*pieces: Tensor, core: Span) -> list[Tensor]:
    fixed, moving, *masks = pieces
    dtype = torch.promote_types(fixed.dtype, torch.float32)
    square = (fixed.to(dtype) - moving.to(dtype)).square()
    return [(square * masks[0].to(square.dtype) if masks else square).sum(dtype=torch.float64)]


def mutual_information(
    fixed: Tensor,
    moving: Tensor,
    partition: Partition,
    bins: int = 32,
    mask: Tensor | None = None,
    window: str = "bspline",
    normalized: bool = False,
    fixed_range: tuple[float, float] | None = None,
    moving_range: tuple[float, float] | None = None,
    backend: Backend = "auto",
    group: Group = None,
) -> Tensor:
    """:func:`patchreg.ops.mutual_information` of whole volumes.

    The ranks' histograms are added up, ``bins**2`` numbers of every pair of images, and the ends of the intensities
    compared; the backward pass sends nothing. The kernels, which never hand their histogram out, are used for the
    gradient alone: the value is the reference's, some thousand operations a voxel instead of some fifty.

    Args:
        fixed: this rank's slab, (B, C, I, J, K).
        moving: likewise.
        partition: of both.
        bins: see :func:`patchreg.ops.mutual_information`.
        mask: this rank's slab of it, (B, 1, I, J, K) or (1, 1, I, J, K).
        window: see :func:`patchreg.ops.mutual_information`.
        normalized: likewise.
        fixed_range: likewise.
        moving_range: likewise.
        backend: see :mod:`patchreg.ops`; what runs the gradient.
        group: the ranks.

    Returns:
        A scalar, the same on all ranks; float32 for half precision.

    Raises:
        InputError: as :func:`patchreg.ops.mutual_information`, slabs that are not the partition's, or ranks that disagree.
        NoGradient: a gradient to the mask was asked for.
    """
    ranks = comm.process_group(group)
    histogram = Histogram(bins, window, normalized, fixed_range, moving_range, backend)
    with agreement("mutual_information", ranks) as facts:
        check_pair(facts, fixed, moving, mask, partition, ranks)
        facts.same(histogram=histogram)
        ops.mutual_information(
            one_voxel(fixed), one_voxel(moving), bins, None, window, normalized, fixed_range, moving_range, backend
        )
        if mask is not None and mask.requires_grad and torch.is_grad_enabled():
            raise NoGradient("mutual_information has no gradient to the mask: detach it")
        if mask is not None and bool((mask < 0).any()):
            raise InputError(f"mask must not be negative, got {float(mask.min()):g}")
    dtype = torch.promote_types(fixed.dtype, torch.float32)
    weight = None
    if mask is not None:
        weight = mask.to(dtype)
        selected_counts(weight, ranks)
    return information(fixed, moving, weight, histogram, ranks).to(dtype)
