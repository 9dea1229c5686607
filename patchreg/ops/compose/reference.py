"""Composition of displacements in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from patchreg.ops.warp import warp
from patchreg.types import Padding


def compose(u: Tensor, v: Tensor, affine: Tensor | None, scale: Tensor | float | None, padding: Padding) -> Tensor:
    """See :func:`patchreg.ops.compose`."""
    return v + warp(u, v, affine, scale, padding=padding, backend="reference")


def integrate(velocity: Tensor, steps: int, padding: Padding) -> Tensor:
    """See :func:`patchreg.ops.integrate`."""
    displacement = velocity / 2**steps
    for _ in range(steps):
        displacement = compose(displacement, displacement, None, None, padding)
    return displacement
