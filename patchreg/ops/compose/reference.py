"""Composition of displacements in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from patchreg.ops.warp import reference
from patchreg.types import Padding


def compose(u: Tensor, v: Tensor, affine: Tensor | None, scale: Tensor | float | None, padding: Padding) -> Tensor:
    """See :func:`patchreg.ops.compose`; every argument is checked and complete here."""
    i, j, k = v.shape[2:]
    return v + reference.warp(u, v, affine, scale, (i, j, k), "linear", padding)


def integrate(velocity: Tensor, steps: int, padding: Padding) -> Tensor:
    """See :func:`patchreg.ops.integrate`."""
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = compose(displacement, displacement, None, None, padding)
    return displacement
