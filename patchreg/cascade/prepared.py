"""An image made ready for the networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchreg.errors import InputError
from patchreg.fake import is_fake
from patchreg.spatial import Foreground, Pyramid, Volume, foreground
from patchreg.spatial.foreground import CONTENT_VOXELS, content_threshold, percentile


@dataclass(frozen=True)
class Normalization:
    """Intensities to the range that the networks see; part of a model, so that training and use cannot differ.

    ``(x - low) / (high - low)``, clipped to [0, 1], where ``low`` is a percentile of all voxels and ``high`` one of
    the content, so that the size of the background does not matter. Both are taken from a copy of about a quarter of
    a million voxels.

    Args:
        lower: percentile for 0.
        upper: percentile for 1.

    Raises:
        InputError: percentiles that are not increasing and within 0 to 100.
    """

    lower: float = 0.5
    upper: float = 99.5

    def __post_init__(self) -> None:
        if not 0 <= self.lower < self.upper <= 100:
            raise InputError(f"normalization needs 0 <= lower < upper <= 100, got {self.lower} and {self.upper}")

    def limits(self, values: Tensor, threshold: float) -> tuple[float, float]:
        """The intensities that become 0 and 1, of one channel whose content is brighter than ``threshold``."""
        low = percentile(values, self.lower)
        bright = values[values > threshold]
        high = percentile(bright, self.upper) if bright.numel() else float(values.max())
        return low, high if high > low else low + 1.0


class Prepared:
    """One image of a pair: normalised copies at the resolutions that are asked for, its content, and its labels.

    A copy at full resolution is made only when a stage asks for one, so a cascade that ends at 2 mm never costs a
    second 1 mm image. Of a volume without numbers (:mod:`patchreg.fake`) everything is content.

    Args:
        volume: the image, as read.
        normalization: of its intensities.
        labels: a label map of the same content, on a grid of its own.
        mask: where its content lies; None finds the foreground.
    """

    def __init__(
        self, volume: Volume, normalization: Normalization, labels: Volume | None = None, mask: Volume | None = None
    ) -> None:
        self.volume = volume
        small = volume.thumbnail(CONTENT_VOXELS)
        if not is_fake(small.data):
            thresholds = [content_threshold(channel) for channel in small.data]
            self.limits = [normalization.limits(c, t) for c, t in zip(small.data, thresholds, strict=True)]
            self.content: Foreground = foreground(small, mask, threshold=thresholds[0])
        else:
            self.limits = [(0.0, 1.0)] * len(small.data)
            whole = volume.grid.whole
            self.content = Foreground(whole.center, *whole.bounds())
        self.labels = Pyramid(labels, labels=True) if labels is not None else None
        self.mask = mask
        self._pyramid = _Normalized(volume, self.limits)

    def at(self, spacing_mm: float) -> Volume:
        """The normalised image for patches of about this spacing; zero is its background."""
        return self._pyramid.at(spacing_mm)

    def volumes(self) -> list[Volume]:
        """Everything of volume size: the image, its labels, and the copies that were made so far."""
        return [self.volume, *self._pyramid.levels(), *(self.labels.levels() if self.labels is not None else ())]


class _Normalized(Pyramid):
    """A pyramid whose levels are normalised after they are pooled."""

    def __init__(self, volume: Volume, limits: list[tuple[float, float]]) -> None:
        super().__init__(volume)
        self._limits = limits
        self._levels = {}

    def at(self, spacing_mm: float) -> Volume:
        factors = self.volume.factors_for(spacing_mm)
        if factors not in self._levels:
            level = Volume(self.volume.data.float(), self.volume.grid, self.volume.name).pooled(factors)
            low = torch.tensor([a for a, _ in self._limits], device=level.device)[:, None, None, None]
            high = torch.tensor([b for _, b in self._limits], device=level.device)[:, None, None, None]
            self._levels[factors] = Volume(level.data.sub(low).div_(high - low).clamp_(0, 1), level.grid, level.name)
        return self._levels[factors]
