"""Random affine maps and deformations of the world."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchreg.errors import InputError
from patchreg.ops.windows import gaussian_smooth
from patchreg.spatial import Affine, Foreground, Grid, Transform, VelocityField


@dataclass(frozen=True)
class WorldAugmentation:
    """Ranges of random transforms. Every number is the largest absolute value; draws are uniform.

    Args:
        rotation_deg: about each world axis, about the content's centre.
        translation_mm: along each world axis.
        scaling: along each world axis, as ``exp(u)``; 0.1 is about 10 percent.
        shearing: off-diagonal entries.
        deformation_mm: largest displacement of the smooth deformation.
        smoothness_mm: smallest and largest standard deviation of its Gaussian smoothing.

    Raises:
        InputError: a negative range.
    """

    rotation_deg: float = 0.0
    translation_mm: float = 0.0
    scaling: float = 0.0
    shearing: float = 0.0
    deformation_mm: float = 0.0
    smoothness_mm: tuple[float, float] = (10.0, 30.0)

    def __post_init__(self) -> None:
        numbers = (self.rotation_deg, self.translation_mm, self.scaling, self.shearing, self.deformation_mm)
        if min(numbers) < 0 or not 0 < self.smoothness_mm[0] <= self.smoothness_mm[1]:
            raise InputError("augmentation ranges must not be negative, and smoothness_mm must be (smallest, largest)")

    def draw_affine(self, center_mm: Tensor, generator: torch.Generator) -> Affine:
        """A random affine map of the world that turns and scales about ``center_mm`` (3,)."""

        def uniform(limit: float) -> Tensor:
            return limit * (2 * torch.rand(3, generator=generator, dtype=torch.float64) - 1)

        rotation = rotation_matrix(uniform(math.radians(self.rotation_deg)))
        stretch = torch.diag(torch.exp(uniform(self.scaling)))
        shear = torch.eye(3, dtype=torch.float64)
        shear[0, 1], shear[0, 2], shear[1, 2] = uniform(self.shearing)
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[:3, :3] = rotation @ shear @ stretch
        center = center_mm.double()
        matrix[:3, 3] = center - matrix[:3, :3] @ center + uniform(self.translation_mm)
        return Affine(matrix)

    def draw_warp(self, content: Foreground, generator: torch.Generator, lattice_mm: float = 6.0) -> Transform:
        """A random smooth diffeomorphism over the content, or the identity where none is asked for."""
        if self.deformation_mm == 0:
            return Affine.identity()
        low, high = content.low_mm - 2 * lattice_mm, content.high_mm + 2 * lattice_mm
        shape = torch.ceil((high - low) / lattice_mm).clamp(min=4).long().tolist()
        grid = Grid.aligned((low + high) / 2, shape, lattice_mm)
        smallest, largest = self.smoothness_mm
        u = torch.rand(2, generator=generator)
        sigma = smallest * (largest / smallest) ** float(u[0]) / lattice_mm
        noise = gaussian_smooth(torch.randn((1, 3, *grid.shape), generator=generator), (sigma,) * 3)
        noise = noise / noise.norm(dim=1).max() * (self.deformation_mm * float(u[1]))
        return VelocityField(grid, noise, steps=4).displacement()


def rotation_matrix(angles_rad: Tensor) -> Tensor:
    """(3, 3): rotation about world x, then y, then z by three angles in radians."""
    x, y, z = angles_rad.tolist()
    about_x = [[1, 0, 0], [0, math.cos(x), -math.sin(x)], [0, math.sin(x), math.cos(x)]]
    about_y = [[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]]
    about_z = [[math.cos(z), -math.sin(z), 0], [math.sin(z), math.cos(z), 0], [0, 0, 1]]
    a, b, c = (torch.tensor(m, dtype=torch.float64) for m in (about_x, about_y, about_z))
    return c @ b @ a
