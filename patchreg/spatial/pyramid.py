"""An image at several resolutions."""

from __future__ import annotations

from patchreg.spatial.volume import Volume
from patchreg.types import Shape3


class Pyramid:
    """A volume, and coarser copies made when they are first wanted.

    A patch of coarse spacing must not pick single voxels of a fine image: that aliases. It samples the copy whose
    voxels are about as large as its own. A copy of half the resolution costs an eighth of the image.

    Args:
        volume: the image at full resolution.
        labels: thin instead of averaging.
    """

    def __init__(self, volume: Volume, labels: bool = False) -> None:
        self.volume, self.labels = volume, labels
        self._levels: dict[Shape3, Volume] = {(1, 1, 1): volume}

    def at(self, spacing_mm: float) -> Volume:
        """The copy for patches of about this spacing."""
        factors = self.volume.factors_for(spacing_mm)
        if factors not in self._levels:
            self._levels[factors] = self.volume.thinned(factors) if self.labels else self.volume.pooled(factors)
        return self._levels[factors]

    def levels(self) -> list[Volume]:
        """The copies that were made so far."""
        return list(self._levels.values())
