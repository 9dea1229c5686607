"""Affine maps of the world."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchreg.errors import GeometryError
from patchreg.spatial.grid import check_affine
from patchreg.spatial.mapped import MappedGrid
from patchreg.spatial.transforms.base import Transform


class Affine(Transform):
    """``T(x) = A x + t`` in world millimetres.

    Args:
        matrix: (4, 4), float64; may carry a gradient.

    Raises:
        GeometryError: the matrix is not finite or not invertible.
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix = torch.as_tensor(matrix).to("cpu", torch.float64)
        check_affine(self.matrix.detach())

    @classmethod
    def identity(cls) -> Affine:
        """The map that leaves every point where it is."""
        return cls(torch.eye(4))

    @classmethod
    def translation(cls, offset_mm: Any) -> Affine:
        """``T(x) = x + offset``."""
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[:3, 3] = torch.as_tensor(offset_mm, dtype=torch.float64)
        return cls(matrix)

    def map(self, points: MappedGrid) -> MappedGrid:
        return points.then_affine(self.matrix)

    def to(self, device: torch.device | str) -> Affine:
        return self

    def detach(self) -> Affine:
        return Affine(self.matrix.detach())

    def inverse(self) -> Affine:
        """The inverse map, exactly."""
        return Affine(torch.linalg.inv(self.matrix))

    def rigid_at(self, center_mm: Tensor) -> Affine:
        """The rotation nearest to the linear part, moving ``center_mm`` (3,) where the affine moves it.

        Raises:
            GeometryError: the map mirrors the world, so that no rotation is near.

        References:
            Polar decomposition; Higham 1986, doi:10.1137/0907079.
        """
        u, _, vh = torch.linalg.svd(self.matrix[:3, :3])
        rotation = u @ vh
        if float(torch.linalg.det(rotation.detach())) < 0:
            raise GeometryError("the affine mirrors the image: it has no nearest rotation")
        center = center_mm.to(torch.float64)
        matrix = torch.eye(4, dtype=torch.float64)
        matrix[:3, :3] = rotation
        matrix[:3, 3] = self.matrix[:3, :3] @ center + self.matrix[:3, 3] - rotation @ center
        return Affine(matrix)

    def __repr__(self) -> str:
        return f"Affine({self.matrix.detach().tolist()})"
