"""Chains of transforms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from patchreg.spatial.mapped import MappedGrid
from patchreg.spatial.transforms.affine import Affine
from patchreg.spatial.transforms.base import Transform


class Composite(Transform):
    """``Composite([T1, T2])(x) = T2(T1(x))``: the first is applied first. Nested chains are flattened.

    Args:
        transforms: any number; none is the identity.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        flat: list[Transform] = []
        for transform in transforms:
            flat.extend(transform.transforms if isinstance(transform, Composite) else [transform])
        self.transforms: tuple[Transform, ...] = tuple(flat)

    def map(self, points: MappedGrid) -> MappedGrid:
        for transform in self.transforms:
            points = transform.map(points)
        return points

    def to(self, device: torch.device | str) -> Composite:
        return Composite([t.to(device) for t in self.transforms])

    def detach(self) -> Composite:
        return Composite([t.detach() for t in self.transforms])

    def affine_part(self) -> Affine:
        """The affine maps of the chain alone, composed; fields are left out."""
        matrix = torch.eye(4, dtype=torch.float64)
        for transform in self.transforms:
            if isinstance(transform, Affine):
                matrix = transform.matrix @ matrix
        return Affine(matrix)

    def __repr__(self) -> str:
        return f"Composite({list(self.transforms)})"
