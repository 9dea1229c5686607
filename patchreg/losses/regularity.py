"""How rough a displacement is, in world units, so that voxel sizes do not change the answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchreg.errors import InputError
from patchreg.ops import checks
from patchreg.types import Spacing3


class Diffusion(nn.Module):
    """The mean squared gradient of a displacement: ``mean |du/dx|^2``, without unit.

    Derivatives are forward differences in mm along the grid's own directions; the sum over all of them does not depend
    on how an orthogonal grid is oriented.

    References:
        Balakrishnan et al. 2019, arXiv:1809.05231, eq. (8), with world units.
    """

    def forward(self, displacement_mm: Tensor, spacing_mm: Spacing3) -> Tensor:
        """A displacement (B, 3, I, J, K) in mm on voxels of ``spacing_mm``; a scalar."""
        checks.volume("displacement", displacement_mm, channels=3)
        total = displacement_mm.new_zeros(())
        for dim, step in zip((2, 3, 4), _checked(spacing_mm), strict=True):
            if displacement_mm.shape[dim] > 1:
                total = total + (displacement_mm.diff(dim=dim) / step).square().sum(dim=1).mean()
        return total


class BendingEnergy(nn.Module):
    """The mean squared second derivatives of a displacement, times a length squared to have no unit.

    ``mean sum_ab |d2u / dx_a dx_b|^2 * scale_mm^2``; zero for every affine displacement.

    Args:
        scale_mm: the length.

    References:
        Rueckert et al. 1999, doi:10.1109/42.796284, eq. (4).
    """

    def __init__(self, scale_mm: float = 1.0) -> None:
        super().__init__()
        self.scale_mm = scale_mm

    def forward(self, displacement_mm: Tensor, spacing_mm: Spacing3) -> Tensor:
        """A displacement (B, 3, I, J, K) in mm on voxels of ``spacing_mm``; a scalar."""
        checks.volume("displacement", displacement_mm, channels=3)
        spacing = _checked(spacing_mm)
        total = displacement_mm.new_zeros(())
        for a in range(3):
            for b in range(a, 3):
                second = _difference(_difference(displacement_mm, a, spacing), b, spacing)
                if second.numel():
                    total = total + (1 if a == b else 2) * second.square().sum(dim=1).mean()
        return total * self.scale_mm**2


def _difference(field: Tensor, axis: int, spacing: Sequence[float]) -> Tensor:
    return torch.diff(field, dim=2 + axis) / spacing[axis]


def _checked(spacing_mm: Sequence[float]) -> Sequence[float]:
    if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
        raise InputError(f"spacing must be three positive numbers in mm, got {spacing_mm}")
    return spacing_mm
