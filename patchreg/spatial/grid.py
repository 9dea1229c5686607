"""A lattice of points in the world: the only carrier of geometry."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchreg.errors import GeometryError
from patchreg.spatial.held import Held
from patchreg.types import Shape3, Spacing3


@dataclass(frozen=True, eq=False)
class Grid(Held):
    """An immutable lattice of voxel centres in the world.

    Args:
        shape: voxels along the array dimensions (I, J, K).
        affine: (4, 4); ``affine @ (i, j, k, 1)`` is the centre of voxel (i, j, k) in RAS+ millimetres. Kept in
            float64 on the CPU.

    Raises:
        GeometryError: a shape that is not three positive integers, or an affine that is not finite and invertible.
    """

    shape: Shape3
    affine: Tensor

    def __init__(self, shape: Sequence[int], affine: Any) -> None:
        shape = tuple(int(n) for n in shape)
        matrix = torch.as_tensor(affine).detach().to("cpu", torch.float64).clone()
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"a grid needs three positive sizes, got {shape}")
        check_affine(matrix)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", matrix)

    @classmethod
    def aligned(cls, center: Sequence[float] | Tensor, shape: Sequence[int], spacing: float | Sequence[float]) -> Grid:
        """A grid whose array axes run along the world's R, A and S, centred on ``center`` (mm)."""
        step = torch.as_tensor(spacing, dtype=torch.float64).expand(3)
        affine = torch.eye(4, dtype=torch.float64)
        affine[:3, :3] = torch.diag(step)
        half = (torch.tensor(list(shape), dtype=torch.float64) - 1) / 2
        affine[:3, 3] = torch.as_tensor(center, dtype=torch.float64) - half * step
        return cls(shape, affine)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Grid) and self.shape == other.shape and torch.equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, tuple(self.affine.flatten().tolist())))

    def __repr__(self) -> str:
        spacing = ", ".join(f"{s:.4g}" for s in self.spacing)
        origin = ", ".join(f"{x:.4g}" for x in self.affine[:3, 3].tolist())
        return f"Grid(shape={self.shape}, spacing=({spacing}) mm, origin=({origin}) mm, axes={self.orientation})"

    @property
    def linear(self) -> Tensor:
        """(3, 3): millimetres in the world for one step along each array dimension (columns)."""
        return self.affine[:3, :3]

    @property
    def spacing(self) -> Spacing3:
        """Millimetres between neighbouring voxels along (I, J, K)."""
        i, j, k = self.linear.norm(dim=0).tolist()
        return (i, j, k)

    @property
    def direction(self) -> Tensor:
        """(3, 3): unit vectors of the array dimensions in the world (columns)."""
        return self.linear / self.linear.norm(dim=0)

    @property
    def center(self) -> Tensor:
        """(3,): the middle of the grid in the world, mm."""
        half = (torch.tensor(self.shape, dtype=torch.float64) - 1) / 2
        return self.linear @ half + self.affine[:3, 3]

    @property
    def voxels(self) -> int:
        """Number of voxels."""
        return math.prod(self.shape)

    @property
    def voxel_volume(self) -> float:
        """Volume of a voxel in cubic millimetres."""
        return abs(float(torch.linalg.det(self.linear)))

    @property
    def orientation(self) -> str:
        """The world directions that the array dimensions point to most nearly, such as ``"RAS"`` or ``"LIA"``."""
        letters, free, linear = ["", "", ""], {0, 1, 2}, self.direction
        for dim in sorted(range(3), key=lambda d: -float(linear[:, d].abs().max())):
            world = max(free, key=lambda w: float(linear[w, dim].abs()))
            free.discard(world)
            letters[dim] = ("RAS" if linear[world, dim] > 0 else "LPI")[world]
        return "".join(letters)

    def to_world(self, points_voxel: Tensor) -> Tensor:
        """World positions (..., 3) in mm of index coordinates (..., 3)."""
        points = points_voxel.to(torch.float64)
        return points @ self.linear.T.to(points.device) + self.affine[:3, 3].to(points.device)

    def to_voxel(self, points_mm: Tensor) -> Tensor:
        """Index coordinates (..., 3) of world positions (..., 3) in mm."""
        inverse = torch.linalg.inv(self.affine).to(points_mm.device)
        return points_mm.to(torch.float64) @ inverse[:3, :3].T + inverse[:3, 3]

    def points(self) -> Tensor:
        """World positions of all voxel centres, (I, J, K, 3), mm. For small grids and tests: hot code never makes it."""
        axes = [torch.arange(n, dtype=torch.float64) for n in self.shape]
        return self.to_world(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1))

    def corners(self) -> Tensor:
        """World positions (8, 3) of the outer corners of the corner voxels, mm."""
        ends = [(-0.5, n - 0.5) for n in self.shape]
        return self.to_world(torch.tensor(list(itertools.product(*ends)), dtype=torch.float64))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The lowest and highest world coordinates, (3,) and (3,) mm, of the box that holds all voxels."""
        corners = self.corners()
        return corners.amin(dim=0), corners.amax(dim=0)

    def contains(self, points_mm: Tensor, margin_voxels: float = 0.5) -> Tensor:
        """Which of the world points (..., 3) lie within ``margin_voxels`` of the lattice, (...) bool."""
        index = self.to_voxel(points_mm)
        last = torch.tensor(self.shape, dtype=torch.float64, device=index.device) - 1
        return ((index >= -margin_voxels) & (index <= last + margin_voxels)).all(dim=-1)

    def crop(self, start: Sequence[float], shape: Sequence[int]) -> Grid:
        """The grid of ``shape`` whose first voxel is voxel ``start`` of this one; it may reach outside."""
        affine = self.affine.clone()
        affine[:3, 3] = self.to_world(torch.tensor([float(s) for s in start]))
        return Grid(shape, affine)

    def padded(self, voxels: int) -> Grid:
        """The grid with ``voxels`` more on every side."""
        return self.crop((-voxels,) * 3, [n + 2 * voxels for n in self.shape])

    def subsampled(self, factors: Sequence[float], start: Sequence[float], shape: Sequence[int]) -> Grid:
        """The lattice that starts at index ``start`` and steps by ``factors`` voxels of this one."""
        affine = self.affine.clone()
        affine[:3, :3] = self.linear * torch.tensor([float(f) for f in factors], dtype=torch.float64)
        affine[:3, 3] = self.to_world(torch.tensor([float(s) for s in start]))
        return Grid(shape, affine)

    def with_spacing(self, spacing: float | Sequence[float]) -> Grid:
        """A lattice over the same box and directions with about this spacing (mm): the box is kept, edge to edge."""
        wanted = torch.as_tensor(spacing, dtype=torch.float64).expand(3).tolist()
        shape = [max(1, round(n * s / w)) for n, s, w in zip(self.shape, self.spacing, wanted, strict=True)]
        factors = [n / m for n, m in zip(self.shape, shape, strict=True)]
        return self.subsampled(factors, [(f - 1) / 2 for f in factors], shape)

    def moved(self, matrix: Tensor) -> Grid:
        """The grid carried through the world by a (4, 4) matrix."""
        return Grid(self.shape, matrix.to(torch.float64) @ self.affine)


def check_affine(matrix: Tensor) -> None:
    """Raise :class:`GeometryError` unless ``matrix`` is a finite, invertible (4, 4) affine."""
    if matrix.shape != (4, 4):
        raise GeometryError(f"an affine must have shape (4, 4), got {tuple(matrix.shape)}")
    if not bool(torch.isfinite(matrix).all()):
        raise GeometryError("the affine has NaN or infinite entries")
    if not torch.equal(matrix[3], torch.tensor([0, 0, 0, 1], dtype=matrix.dtype)):
        raise GeometryError(f"the last row of an affine must be (0, 0, 0, 1), got {tuple(matrix[3].tolist())}")
    columns = matrix[:3, :3].norm(dim=0)
    if float(columns.min()) == 0 or abs(float(torch.linalg.det(matrix[:3, :3] / columns.clamp(min=1e-300)))) < 1e-6:
        raise GeometryError("the affine is singular: it flattens the image, so voxels have no place in the world")
