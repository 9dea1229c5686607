"""The points of a grid on their way through a chain of transforms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchreg.errors import GridMismatch
from patchreg.spatial.grid import Grid
from patchreg.spatial.held import index_map
from patchreg.spatial.linear import apply_linear
from patchreg.spatial.volume import Volume
from patchreg.types import Interpolation, Padding


@dataclass(frozen=True, eq=False)
class MappedGrid:
    """World points ``y(x) = A x + d(x)`` for every voxel centre ``x`` of a grid.

    Every chain of affine maps and displacement fields, restricted to a grid, has this form. The affine part is exact
    float64 and never spread over the voxels, so that a chain of affine maps costs no memory and a chain with fields
    costs one displacement, whatever its length.

    Args:
        grid: the points ``x``.
        matrix: ``A``, (4, 4), world to world, float64, on the CPU; may carry a gradient.
        displacement_mm: ``d``, (1, 3, I, J, K), world RAS+ mm, components (x, y, z). None: zero.
    """

    grid: Grid
    matrix: Tensor
    displacement_mm: Tensor | None = None

    def __post_init__(self) -> None:
        d = self.displacement_mm
        if d is not None and tuple(d.shape) != (1, 3, *self.grid.shape):
            raise GridMismatch(
                f"displacement must have shape {(1, 3, *self.grid.shape)} to match the grid, got {tuple(d.shape)}"
            )

    @classmethod
    def identity(cls, grid: Grid) -> MappedGrid:
        """The points of ``grid`` where they are."""
        return cls(grid, torch.eye(4, dtype=torch.float64))

    def index_map(self, target: Grid) -> tuple[Tensor, Tensor]:
        """``[A | t]`` (3, 4) from voxels of this grid, and ``S`` (3, 3) from mm, to voxels of ``target``."""
        return index_map(self.grid, self.matrix, target)

    def sample(self, volume: Volume, mode: Interpolation = "linear", padding: Padding = "zeros") -> Tensor:
        """The volume's values at the mapped points: (1, C, I, J, K), on the volume's device, interpolated once."""
        return volume.grid.read(volume.batch, self.grid, self.matrix, self.displacement_mm, mode, padding)

    def inside(self, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Which mapped points lie within half a voxel of ``grid``, (1, 1, I, J, K) bool: the rest sample padding."""
        ones = Volume(torch.ones((1, 1, 1, 1), device=device), _one_voxel(grid.whole))
        return self.sample(ones, mode="nearest") > 0

    def strided(self, step: int, start: tuple[int, int, int]) -> MappedGrid:
        """Every ``step``-th point along each dimension, from the voxel ``start``."""
        (i, j, k), grid = self.grid.strided(step, start)
        d = None if self.displacement_mm is None else self.displacement_mm[:, :, i, j, k]
        return MappedGrid(grid, self.matrix, d)

    def then_affine(self, matrix: Tensor) -> MappedGrid:
        """The points after a further affine map, (4, 4) world to world."""
        d = self.displacement_mm
        if d is not None:
            d = apply_linear(self.grid.for_part(matrix.to(d.device))[:3, :3], d)
        return replace(self, matrix=matrix @ self.matrix, displacement_mm=d)

    def then_field(self, grid: Grid, displacement_mm: Tensor, padding: Padding) -> MappedGrid:
        """The points after a further displacement field (1, 3, ...) that lies on ``grid``."""
        d = self.displacement_mm
        if d is None and self.grid == grid and torch.equal(self.matrix, torch.eye(4, dtype=torch.float64)):
            return replace(self, displacement_mm=displacement_mm)
        step = self.sample(Volume(displacement_mm[0], grid), padding=padding)
        return replace(self, displacement_mm=step if d is None else d.to(step.device) + step)

    def total_displacement_mm(self, device: torch.device | str = "cpu") -> Tensor:
        """``y(x) - x`` of every voxel, (1, 3, I, J, K) float32, affine part included, world mm."""
        offset = (
            self.grid.for_part(self.matrix) - torch.eye(4, dtype=torch.float64)
        ) @ self.grid.affine  # voxel -> displacement in mm
        i, j, k = (torch.arange(n, dtype=torch.float32, device=device) for n in self.grid.shape)
        column = offset[:3, :, None, None, None].to(device, torch.float32)
        total = column[:, 0] * i[:, None, None] + column[:, 1] * j[:, None] + column[:, 2] * k + column[:, 3]
        return total[None] if self.displacement_mm is None else total[None] + self.displacement_mm.to(device)


def _one_voxel(grid: Grid) -> Grid:
    """A grid of one voxel that fills the box of ``grid``."""
    return grid.subsampled(grid.shape, [(n - 1) / 2 for n in grid.shape], (1, 1, 1))
