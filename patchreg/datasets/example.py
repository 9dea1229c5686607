"""What the images of a data module are like, as headers and settings say, without reading or making a voxel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patchreg.spatial import Grid


@dataclass(frozen=True, eq=False)
class Example:
    """A training pair as far as it is known beforehand.

    Args:
        source: where this comes from, or why it is not known.
        grid: of an image; None where it is not known, for example because the files are not there.
        labels: what label maps are stored in; None where there are none, or it is not known.
    """

    source: str
    grid: Grid | None = None
    labels: torch.dtype | None = None
