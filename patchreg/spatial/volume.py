"""An image: a tensor on a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
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
        ones; see :class:`patchreg.spatial.pooling.Blocks` for what happens at the edges.
        """
        if factors == (1, 1, 1):
            return self
        i, j, k = (min(f, n) for f, n in zip(factors, self.grid.whole.shape, strict=True))
        data, grid = self.grid.pool(self.data, (i, j, k))
        return replace(self, data=data, grid=grid)

    def thumbnail(self, voxels: int) -> Volume:
        """A float copy of at most about ``voxels`` voxels, for statistics; whole in every process."""
        step = max(1, math.ceil((self.grid.whole.voxels / voxels) ** (1 / 3)))
        small = replace(self, data=self.data.float()).pooled((step,) * 3)
        return replace(small, data=small.grid.gathered(small.data), grid=small.grid.whole)

    def thinned(self, factors: Shape3) -> Volume:
        """Every n-th voxel along each dimension, from the middle of each block: for labels, which have no means."""
        if factors == (1, 1, 1):
            return self
        data, grid = self.grid.thin(self.data, factors)
        return replace(self, data=data, grid=grid)

    def factors_for(self, spacing_mm: float) -> Shape3:
        """Voxels to merge along each dimension so that the image has about ``spacing_mm``, finer rather than coarser."""
        wanted = zip(self.grid.spacing, self.grid.whole.shape, strict=True)
        i, j, k = (min(max(1, int(spacing_mm / s + 0.49)), n) for s, n in wanted)
        return (i, j, k)
