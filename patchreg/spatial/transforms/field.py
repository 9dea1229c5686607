"""Displacement and velocity fields in world millimetres."""

from __future__ import annotations

import torch
from torch import Tensor

from patchreg import ops
from patchreg.errors import GridMismatch
from patchreg.spatial.grid import Grid
from patchreg.spatial.linear import apply_linear
from patchreg.spatial.mapped import MappedGrid
from patchreg.spatial.transforms.base import Transform
from patchreg.types import Padding


class DisplacementField(Transform):
    """``T(x) = x + u(x)``, interpolated linearly between the points of a grid.

    Args:
        grid: where the displacements lie.
        displacement_mm: ``u``, (1, 3, I, J, K), world RAS+ mm, components (x, y, z).
        padding: what ``u`` is outside the grid: ``"border"``, the nearest value; ``"zeros"``, as in ITK.

    Raises:
        GridMismatch: the field has not the grid's shape.
    """

    def __init__(self, grid: Grid, displacement_mm: Tensor, padding: Padding = "border") -> None:
        _check(grid, displacement_mm)
        self.grid, self.displacement_mm, self.padding = grid, displacement_mm, padding

    def map(self, points: MappedGrid) -> MappedGrid:
        return points.then_field(self.grid, self.displacement_mm, self.padding)

    def to(self, device: torch.device | str) -> DisplacementField:
        return DisplacementField(self.grid, self.displacement_mm.to(device), self.padding)

    def detach(self) -> DisplacementField:
        return DisplacementField(self.grid, self.displacement_mm.detach(), self.padding)

    def resampled(self, grid: Grid) -> DisplacementField:
        """The same field, interpolated at the points of another grid."""
        mapped = self.on(grid)
        assert mapped.displacement_mm is not None
        return DisplacementField(grid, mapped.displacement_mm, self.padding)

    def __repr__(self) -> str:
        return f"DisplacementField({self.grid}, padding={self.padding!r})"


class VelocityField(Transform):
    """``T = exp(v)``, the flow over unit time of a stationary velocity; smooth velocities give diffeomorphisms.

    Args:
        grid: where the velocities lie.
        velocity_mm: ``v``, (1, 3, I, J, K), world RAS+ mm per unit time.
        steps: squarings of the integration.

    Raises:
        GridMismatch: the field has not the grid's shape.

    References:
        Arsigny et al. 2006, doi:10.1007/11866565_113.
    """

    def __init__(self, grid: Grid, velocity_mm: Tensor, steps: int = 7) -> None:
        _check(grid, velocity_mm)
        self.grid, self.velocity_mm, self.steps = grid, velocity_mm, steps

    def displacement(self) -> DisplacementField:
        """The flow as a displacement field on the same grid."""
        v = self.velocity_mm
        to_voxel = torch.linalg.inv(self.grid.linear)
        flow = ops.integrate(apply_linear(to_voxel, v), self.steps)
        return DisplacementField(self.grid, apply_linear(self.grid.linear, flow))

    def map(self, points: MappedGrid) -> MappedGrid:
        return self.displacement().map(points)

    def to(self, device: torch.device | str) -> VelocityField:
        return VelocityField(self.grid, self.velocity_mm.to(device), self.steps)

    def detach(self) -> VelocityField:
        return VelocityField(self.grid, self.velocity_mm.detach(), self.steps)

    def inverse(self) -> VelocityField:
        """The flow backwards, ``exp(-v)``."""
        return VelocityField(self.grid, -self.velocity_mm, self.steps)


def _check(grid: Grid, field: Tensor) -> None:
    wanted = (1, 3, *grid.shape)
    if tuple(field.shape) != wanted:
        hint = ": move the components to dim 1" if field.shape[-1] == 3 and field.shape[1] != 3 else ""
        raise GridMismatch(f"the field must have shape {wanted} to match the grid, got {tuple(field.shape)}{hint}")
