"""Where a registration starts."""

from __future__ import annotations

import logging

import torch

from patchreg.cascade import Prepared
from patchreg.spatial import Affine, Transform

log = logging.getLogger(__name__)


def starting_points(fixed: Prepared, moving: Prepared) -> list[tuple[str, Transform]]:
    """Places worth starting from: the worlds as the files have them, and centres of mass on each other.

    The headers are left out where they put the contents beside each other.
    """
    shift = moving.content.center_mm - fixed.content.center_mm
    by_mass = ("centres of mass", Affine.translation(shift))
    if not overlap(fixed, moving):
        log.warning(
            "%s and %s do not overlap in the world; they are centred by their centres of mass, %.0f mm apart",
            fixed.volume.name,
            moving.volume.name,
            float(shift.norm()),
        )
        return [by_mass]
    if float(shift.norm()) < 5:
        return [("headers", Affine.identity())]
    return [("headers", Affine.identity()), by_mass]


def overlap(fixed: Prepared, moving: Prepared) -> bool:
    """Whether the boxes of the contents share at least a tenth of the smaller one."""
    low = torch.maximum(fixed.content.low_mm, moving.content.low_mm)
    high = torch.minimum(fixed.content.high_mm, moving.content.high_mm)
    shared = float((high - low).clamp(min=0).prod())
    sizes = [float((c.high_mm - c.low_mm).prod()) for c in (fixed.content, moving.content)]
    return shared > 0.1 * min(sizes)
