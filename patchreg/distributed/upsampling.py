"""A coarse lattice smoothed and interpolated at the points of a finer one, both split: how a deformation is optimised."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor

from patchreg.distributed.layers.interpolation import interpolate
from patchreg.distributed.layout import Layout
from patchreg.distributed.partition import Partition
from patchreg.distributed.scope import Scope
from patchreg.distributed.shards import share
from patchreg.ops.windows import gaussian_smooth
from patchreg.types import Shape3


def smooth_upsampled(
    coarse: Tensor,
    shape: Shape3,
    onto: Shape3,
    partition: Partition,
    group: dist.ProcessGroup,
    sigma: float = 1.0,
    truncate: float = 2.0,
) -> Tensor:
    """What one process finds by ``interpolate(gaussian_smooth(coarse), onto, "trilinear", align_corners=False)``.

    Args:
        coarse: this rank's part of the coarse lattice, (B, C, i, j, k), as :class:`Layout` of ``partition`` says; all of
            it where that says None.
        shape: of the whole coarse lattice.
        onto: of the whole fine lattice.
        partition: of the fine lattice.
        group: the ranks.
        sigma: of the Gaussian, in voxels of the coarse lattice; edges are replicated.
        truncate: sigmas after which it ends.

    Returns:
        This rank's slab of the fine lattice. The gradient of the coarse lattice is whole: that of a part on the rank that
        holds it, that of a lattice that all hold on all.
    """
    scope, dim = Scope(Layout(partition), group), partition.dim
    total, sigmas = shape[dim - 2], (sigma,) * 3
    if scope.layout.of(total) is None:
        smooth = gaussian_smooth(share(coarse, group), sigmas, truncate)
    else:
        radius = math.ceil(truncate * sigma)
        spans = [(low - radius, high + radius) for low, high in scope.spans(total)]
        around = gaussian_smooth(scope.bring(coarse, total, spans, outside="border"), sigmas, truncate)
        smooth = around.narrow(dim, radius, scope.size(total))
    return interpolate(smooth, size=onto, mode="trilinear", align_corners=False, scope=scope, total=total)
