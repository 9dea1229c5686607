"""What every transform can do."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from patchreg.spatial.grid import Grid
from patchreg.spatial.mapped import MappedGrid


class Transform(ABC):
    """A map from world points of the fixed image to world points of the moving image: ``warped(x) = moving(T(x))``."""

    @abstractmethod
    def map(self, points: MappedGrid) -> MappedGrid:
        """Carry points through the transform."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Transform:
        """The transform with its fields on ``device``; matrices stay on the CPU."""

    @abstractmethod
    def detach(self) -> Transform:
        """The transform without its gradient history."""

    def on(self, grid: Grid) -> MappedGrid:
        """Where the voxel centres of ``grid`` go."""
        return self.map(MappedGrid.identity(grid))

    def __call__(self, points_mm: Tensor | ArrayLike) -> Tensor:
        """Where world points go.

        Args:
            points_mm: (..., 3), RAS+ mm; a tensor, an array or nested lists.

        Returns:
            (..., 3), float64, on the CPU; fields are interpolated linearly.
        """
        points = torch.as_tensor(points_mm).to("cpu", torch.float64)
        flat = points.reshape(-1, 3)
        grid = Grid((max(1, flat.shape[0]), 1, 1), torch.eye(4))
        if flat.shape[0] == 0:
            return points
        # Every point as the displacement from a common centre: float32 then resolves micrometres.
        center = flat.detach().mean(dim=0)
        matrix = torch.zeros(4, 4, dtype=torch.float64)
        matrix[:3, 3], matrix[3, 3] = center, 1
        offset = (flat - center).T.reshape(1, 3, -1, 1, 1)
        mapped = self.map(MappedGrid(grid, matrix, offset))
        assert mapped.displacement_mm is not None
        moved = mapped.displacement_mm[0, :, :, 0, 0].T.to("cpu", torch.float64) + mapped.matrix[:3, 3]
        return moved.reshape(points.shape)
