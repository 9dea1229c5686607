"""An image: a tensor on a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.errors import GridMismatch
from patchreg.spatial.grid import Grid
from patchreg.types import Shape3


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxel values and where they lie.

    Args:
        data: (C, I, J, K), intensities, or integer labels.
        grid: their place in the world.
        name: where it came from, for messages.

    Raises:
        GridMismatch: the tensor has not the grid's shape.
    """

    data: Tensor
    grid: Grid
    name: str = ""

    def __post_init__(self) -> None:
        if self.data.ndim != 4 or tuple(self.data.shape[1:]) != self.grid.shape:
            raise GridMismatch(
                f"data must have shape (C, {', '.join(map(str, self.grid.shape))}), got {tuple(self.data.shape)}"
            )

    @property
    def batch(self) -> Tensor:
        """The data as (1, C, I, J, K)."""
        return self.data[None]

    @property
    def device(self) -> torch.device:
        """Where the data is."""
        return self.data.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Volume:
        """The same volume on another device."""
        return replace(self, data=self.data.to(device, non_blocking=non_blocking))

    def pooled(self, factors: Shape3) -> Volume:
        """Means over blocks of ``factors`` voxels, on the lattice of the blocks' centres.

        The blocks lie evenly about the middle of the image, so that an image stored the other way round has the same
        ones. Blocks that reach over the edge average what is there; where an odd number of voxels cannot be shared
        out evenly among even blocks, neighbours are averaged first; up to half a block is cut off each edge otherwise.
        """
        if factors == (1, 1, 1):
            return self
        i, j, k = (min(f, n) for f, n in zip(factors, self.grid.shape, strict=True))
        factors = (i, j, k)
        x, padding, start = self.batch, [0, 0, 0], [0.0, 0.0, 0.0]
        for d, factor in enumerate(factors):
            size = x.shape[2 + d]
            if factor % 2 == 0 and size % 2 == 1 and size > 1:
                x = (x.narrow(2 + d, 0, size - 1) + x.narrow(2 + d, 1, size - 1)) / 2
                size, start[d] = size - 1, 0.5
            missing = -size % factor
            if missing % 2 == 0:
                padding[d] = missing // 2
            elif size > factor:
                cut = (size % factor) // 2
                x = x.narrow(2 + d, cut, size - 2 * cut)
                start[d] += cut
            start[d] += (factor - 1) / 2 - padding[d]
        data = F.avg_pool3d(x, factors, padding=padding, count_include_pad=False, ceil_mode=True)[0]
        return replace(self, data=data, grid=self.grid.subsampled(factors, start, data.shape[1:]))

    def thumbnail(self, voxels: int) -> Volume:
        """A float copy of at most about ``voxels`` voxels, for statistics."""
        step = max(1, math.ceil((self.grid.voxels / voxels) ** (1 / 3)))
        return replace(self, data=self.data.float()).pooled((step,) * 3)

    def thinned(self, factors: Shape3) -> Volume:
        """Every n-th voxel along each dimension, from the middle of each block: for labels, which have no means."""
        if factors == (1, 1, 1):
            return self
        start = [(f - 1) // 2 if n >= f else (n - 1) // 2 for f, n in zip(factors, self.grid.shape, strict=True)]
        i, j, k = (slice(s, None, f) for s, f in zip(start, factors, strict=True))
        data = self.data[:, i, j, k].contiguous()
        return replace(self, data=data, grid=self.grid.subsampled(factors, start, data.shape[1:]))

    def factors_for(self, spacing_mm: float) -> Shape3:
        """Voxels to merge along each dimension so that the image has about ``spacing_mm``, finer rather than coarser."""
        wanted = zip(self.grid.spacing, self.grid.shape, strict=True)
        i, j, k = (min(max(1, int(spacing_mm / s + 0.49)), n) for s, n in wanted)
        return (i, j, k)
