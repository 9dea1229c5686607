"""A chain of transforms as one displacement field and one affine map."""

from __future__ import annotations

import torch
from torch import Tensor

from patchreg.spatial.grid import Grid
from patchreg.spatial.linear import apply_linear
from patchreg.spatial.transforms import Affine, Composite, DisplacementField, Transform


def collapse(transform: Transform, fixed: Grid) -> Composite:
    """``Composite([D, A])`` with one displacement field over the fixed image, as ITK and ANTs like it.

    The field's lattice has the fixed image's directions, reaches one voxel beyond it, and is twice as fine as the finest
    field of the chain but no finer than the image. Where there is no deformation the affine map alone is returned.
    """
    composite = Composite([transform])
    fields = [t for t in composite.transforms if isinstance(t, DisplacementField)]
    if not fields:
        return Composite([composite.affine_part()])
    finest = min(min(t.grid.spacing) for t in fields) / 2
    grid = fixed.share(_field_grid(fixed.whole, [max(finest, s) for s in fixed.spacing]))
    u, affine = deformable_part(composite, grid)
    return Composite([DisplacementField(grid, u.cpu()), affine])


def _field_grid(fixed: Grid, spacing: list[float]) -> Grid:
    direction = fixed.direction
    if float((direction.T @ direction - torch.eye(3, dtype=torch.float64)).abs().max()) > 1e-4:
        low, high = fixed.bounds()  # sheared: ITK has no such fields, so cover it by a world-aligned one
        shape = ((high - low) / min(spacing)).ceil().long() + 2
        return Grid.aligned((low + high) / 2, shape.tolist(), min(spacing))
    return fixed.with_spacing(spacing).padded(1)


def deformable_part(transform: Transform, grid: Grid) -> tuple[Tensor, Affine]:
    """``u`` (1, 3, I, J, K) in mm on a grid, and ``A``, with ``T(x) = A (x + u(x))``."""
    mapped = transform.on(grid)
    affine = Affine(mapped.matrix)
    if mapped.displacement_mm is None:
        return torch.zeros((1, 3, *grid.shape)), affine
    return apply_linear(torch.linalg.inv(mapped.matrix[:3, :3]), mapped.displacement_mm), affine
