"""Planes through the world to look at, and what images and transforms look like on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from patchreg.spatial import Foreground, Grid, MappedGrid, Transform, Volume, jacobian_determinant

Array = np.ndarray


@dataclass(frozen=True)
class Plane:
    """A plane of the world, one voxel thick.

    Args:
        name: axial, coronal or sagittal.
        grid: world-aligned; one dimension has a single voxel.
        axes: the two world axes (0 R, 1 A, 2 S) that run right and up in a picture.
    """

    name: str
    grid: Grid
    axes: tuple[int, int]

    @property
    def normal(self) -> int:
        """The world axis across the plane."""
        return 3 - sum(self.axes)

    @property
    def extent_mm(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top of the picture in world mm."""
        low, high = self.grid.bounds()
        a, b = self.axes
        return float(low[a]), float(high[a]), float(low[b]), float(high[b])


def planes(content: Foreground, pixels: int = 160, margin_mm: float = 12.0) -> list[Plane]:
    """The three planes through the middle of some content, of square pixels, whatever way the image is stored."""
    low, high = content.low_mm - margin_mm, content.high_mm + margin_mm
    size = high - low
    step = float(size.max()) / pixels
    shape = [max(1, round(float(s) / step)) for s in size]
    center = (low + high) / 2
    found = []
    for name, axes in (("axial", (0, 1)), ("coronal", (0, 2)), ("sagittal", (1, 2))):
        thin = [n if dim in axes else 1 for dim, n in enumerate(shape)]
        found.append(Plane(name, Grid.aligned(center, thin, step), axes))
    return found


def picture(volume: Volume, transform: Transform, plane: Plane) -> Array:
    """The image on a plane, seen through a transform: (height, width) float32, up is up."""
    values = transform.on(plane.grid).sample(volume)[0, 0]
    return _flat(values, plane)


def mapped_mm(transform: Transform, plane: Plane) -> tuple[Array, Array]:
    """Where the plane's points go, along its two axes: two (height, width) arrays in world mm."""
    u = transform.on(plane.grid).total_displacement_mm()[0]
    points = plane.grid.points().permute(3, 0, 1, 2).float() + u
    a, b = plane.axes
    return _flat(points[a], plane), _flat(points[b], plane)


def log_jacobian(transform: Transform, plane: Plane) -> Array:
    """The logarithm of the Jacobian determinant on a plane, (height, width); folded points are NaN."""
    thick = plane.grid.crop(
        [-1 if n == 1 else 0 for n in plane.grid.shape], [3 if n == 1 else n for n in plane.grid.shape]
    )
    determinant = jacobian_determinant(transform.on(thick))[0, 0].select(plane.normal, 1)
    logarithm = torch.where(determinant > 0, determinant.clamp(min=1e-6).log(), torch.nan)
    array: Array = logarithm.detach().cpu().numpy().T
    return array


def values_on(values: Volume, plane: Plane) -> Array:
    """A map in the fixed world, such as an uncertainty, on a plane: (height, width)."""
    return _flat(MappedGrid.identity(plane.grid).sample(values)[0, 0], plane)


def _flat(values: torch.Tensor, plane: Plane) -> Array:
    array: Array = values.select(plane.normal, 0).detach().cpu().float().numpy().T
    return array
