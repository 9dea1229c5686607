"""Where patches lie on a lattice, and how their answers are blended."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchreg.errors import InputError
from patchreg.spatial.grid import Grid
from patchreg.types import Shape3


def cover(length: int, patch: int, overlap: float, generator: torch.Generator | None = None) -> list[int]:
    """First voxels of the patches that cover ``length`` voxels along one dimension.

    Neighbours overlap by at least ``overlap`` of a patch, spread evenly so that the first starts at 0 and the last
    ends at the end. With a ``generator`` there is one patch more, and the inner ones are moved together at random as
    far as everything stays covered.

    Raises:
        InputError: an overlap outside [0, 1), or a patch longer than ``length``.
    """
    if not 0 <= overlap < 1:
        raise InputError(f"overlap must be from 0 to below 1, got {overlap}")
    if patch > length:
        raise InputError(f"a patch of {patch} voxels does not fit {length}: pad the lattice first")
    if patch == length:
        return [0]
    stride = max(1, math.floor(patch * (1 - overlap)))
    steps = math.ceil((length - patch) / stride)
    shift = 0.0
    if generator is not None:
        steps += 1
        exact = (length - patch) / steps
        shift = (2 * float(torch.rand(1, generator=generator)) - 1) * min(exact, max(0.0, patch - exact))
    exact = (length - patch) / steps
    inner = [min(max(round(i * exact + shift), 0), length - patch) for i in range(1, steps)]
    return [0, *inner, length - patch]


def tile(lattice: Shape3, patch: Shape3, overlap: float, generator: torch.Generator | None = None) -> list[Shape3]:
    """First voxels of patches that cover a lattice: regular, or moved at random where a ``generator`` is given."""
    starts = [cover(n, p, overlap, generator) for n, p in zip(lattice, patch, strict=True)]
    return list(itertools.product(*starts))  # type: ignore[arg-type]


def window(shape: Shape3, device: torch.device | str = "cpu") -> Tensor:
    """A smooth weight for a patch, (1, 1, I, J, K): the product of squared sines, positive everywhere, 1 in the middle."""
    axes = [torch.sin(math.pi * (torch.arange(n, device=device) + 0.5) / n).square().clamp(min=1e-3) for n in shape]
    return (axes[0][:, None, None] * axes[1][:, None] * axes[2])[None, None]


@dataclass
class Blend:
    """Running weighted means of patch displacements on a lattice: a smooth partition of unity.

    Args:
        grid: the lattice.
        sum_mm: sum of weight times displacement, (1, 3, I, J, K).
        weight: sum of weights, (1, 1, I, J, K).
        square_mm2: sum of weight times squared length of the displacement, (1, 1, I, J, K).
    """

    grid: Grid
    sum_mm: Tensor
    weight: Tensor
    square_mm2: Tensor

    @classmethod
    def empty(cls, grid: Grid, device: torch.device | str = "cpu") -> Blend:
        """Nothing blended yet. Costs five volumes of the lattice."""
        field, scalar = (1, 3, *grid.shape), (1, 1, *grid.shape)
        return cls(
            grid,
            torch.zeros(field, device=device),
            torch.zeros(scalar, device=device),
            torch.zeros(scalar, device=device),
        )

    def add(self, start: Shape3, displacement_mm: Tensor, weight: Tensor) -> None:
        """Blend in a patch (1, 3, i, j, k) whose first voxel is ``start``, with its weight (1, 1, i, j, k).

        Of a patch that reaches over the lattice, which may be a part of a larger one, what lies on it counts.
        """
        for dim, (low, length) in enumerate(zip(start, self.grid.shape, strict=True), start=2):
            size = displacement_mm.shape[dim]
            first, end = min(max(0, -low), size), min(size, length - low)
            displacement_mm, weight = (x.narrow(dim, first, max(0, end - first)) for x in (displacement_mm, weight))
        start = tuple(max(0, s) for s in start)  # type: ignore[assignment]
        i, j, k = (slice(s, s + n) for s, n in zip(start, displacement_mm.shape[2:], strict=True))
        displacement_mm, weight = displacement_mm.to(self.sum_mm), weight.to(self.weight)
        self.sum_mm[:, :, i, j, k] += weight * displacement_mm
        self.weight[:, :, i, j, k] += weight
        self.square_mm2[:, :, i, j, k] += weight * displacement_mm.square().sum(dim=1, keepdim=True)

    def mean_mm(self) -> Tensor:
        """The blended displacement, (1, 3, I, J, K)."""
        return self.sum_mm / self.weight.clamp(min=1e-12)

    def spread_mm(self) -> Tensor:
        """The weighted standard deviation of the patches' displacements about the blend, (1, 1, I, J, K), mm."""
        weight = self.weight.clamp(min=1e-12)
        variance = self.square_mm2 / weight - (self.sum_mm / weight).square().sum(dim=1, keepdim=True)
        return variance.clamp(min=0).sqrt()
