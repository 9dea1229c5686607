"""An image: a tensor on a grid."""

from __future__ import annotations

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
        """Means over blocks of ``factors`` voxels, on the lattice of the blocks' centres. Cut blocks average what is there."""
        if factors == (1, 1, 1):
            return self
        grid = self.grid.pooled(factors)
        data = F.avg_pool3d(self.batch, factors, ceil_mode=True)[0]
        return replace(self, data=data, grid=grid)

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
        i, j, k = (max(1, int(spacing_mm / s + 0.49)) for s in self.grid.spacing)
        return (i, j, k)
