"""How a transform changes volume."""

from __future__ import annotations

import torch
from torch import Tensor

from patchreg.ops.precision import full_precision
from patchreg.spatial.grid import Grid
from patchreg.spatial.mapped import MappedGrid

AT_ONCE = 2**19
"""Voxels whose derivatives are made at a time, of about 40 numbers each."""


@full_precision
def spatial_gradient_mm(field: Tensor, grid: Grid) -> Tensor:
    """Central differences with respect to the world.

    Args:
        field: (B, C, I, J, K) on ``grid``, or on some planes of it.
        grid: its lattice, of any orientation; a dimension of one voxel has gradient zero.

    Returns:
        (B, C, 3, I, J, K): derivatives along world (x, y, z), per mm; one-sided at the edges.
    """
    steps = [
        torch.gradient(field, dim=dim)[0] if field.shape[dim] > 1 else torch.zeros_like(field) for dim in (2, 3, 4)
    ]
    along_voxels = torch.stack(steps, dim=2)
    to_world = torch.linalg.inv(grid.linear).to(field.device, field.dtype)  # rows: voxel axes; columns: world axes
    return torch.einsum("bcaijk,aw->bcwijk", along_voxels, to_world)


def jacobian_determinant(mapped: MappedGrid) -> Tensor:
    """The determinant of the Jacobian of ``x -> A x + d(x)`` in the world.

    Args:
        mapped: a transform restricted to a grid; of a part of a larger one all who hold parts must call this.

    Returns:
        (1, 1, I, J, K): 1 keeps volume, above 1 the moving image is larger there, at or below 0 the map folds.
    """
    linear = mapped.matrix[:3, :3]
    if mapped.displacement_mm is None:
        return torch.linalg.det(linear).to(torch.float32).expand(1, 1, *mapped.grid.shape)
    grid = mapped.grid
    d, dim, first = grid.with_neighbours(mapped.displacement_mm)
    end = first + grid.shape[dim - 2]
    layers = max(1, AT_ONCE * grid.shape[dim - 2] // grid.voxels)
    found = []
    for start in range(first, end, layers):
        stop = min(start + layers, end)
        low, high = max(0, start - 1), min(stop + 1, d.shape[dim])
        part = _determinant(d.narrow(dim, low, high - low), grid, linear)
        found.append(part.narrow(dim, start - low, stop - start))
    return torch.cat(found, dim=dim)


def _determinant(d: Tensor, grid: Grid, linear: Tensor) -> Tensor:
    """The determinant (1, 1, I, J, K) of a displacement on some planes of a grid, after a linear map."""
    j = spatial_gradient_mm(d, grid) + linear.to(d.device, d.dtype)[None, :, :, None, None, None]
    det = (
        j[:, 0, 0] * (j[:, 1, 1] * j[:, 2, 2] - j[:, 1, 2] * j[:, 2, 1])
        - j[:, 0, 1] * (j[:, 1, 0] * j[:, 2, 2] - j[:, 1, 2] * j[:, 2, 0])
        + j[:, 0, 2] * (j[:, 1, 0] * j[:, 2, 1] - j[:, 1, 1] * j[:, 2, 0])
    )
    return det[:, None]


def folding_percent(determinant: Tensor, mask: Tensor | None = None) -> float:
    """Percentage of voxels (of those in ``mask``) where a Jacobian determinant is not positive."""
    folded = determinant <= 0
    if mask is not None:
        folded = folded[mask.expand_as(folded)]
    return 100.0 * float(folded.float().mean()) if folded.numel() else 0.0
