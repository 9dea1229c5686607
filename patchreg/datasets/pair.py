"""A pair of images as the training sees it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from patchreg.spatial import Affine, Transform, Volume


@dataclass(frozen=True, eq=False)
class Pair:
    """Two images, with labels where there are any, and the random deformations they are seen through.

    Affine augmentation moves a volume's grid through the world and costs nothing. Deformations are carried along as
    transforms and applied when a patch is sampled, so that no image is ever resampled for augmentation.

    Args:
        fixed: (C, I, J, K) intensities on their own grid.
        moving: likewise, of any other shape.
        fixed_labels: (1, I, J, K) integers, on any grid.
        moving_labels: likewise.
        fixed_warp: the fixed image is ``fixed(W(x))``.
        moving_warp: the moving image is ``moving(W(x))``.
        name: for messages and pictures.
    """

    fixed: Volume
    moving: Volume
    fixed_labels: Volume | None = None
    moving_labels: Volume | None = None
    fixed_warp: Transform = field(default_factory=Affine.identity)
    moving_warp: Transform = field(default_factory=Affine.identity)
    name: str = ""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pair:
        """The pair on another device."""

        def move(volume: Volume | None) -> Volume | None:
            return None if volume is None else volume.to(device, non_blocking)

        return replace(
            self,
            fixed=self.fixed.to(device, non_blocking),
            moving=self.moving.to(device, non_blocking),
            fixed_labels=move(self.fixed_labels),
            moving_labels=move(self.moving_labels),
            fixed_warp=self.fixed_warp.to(device),
            moving_warp=self.moving_warp.to(device),
        )


def collate(pairs: list[Pair]) -> list[Pair]:
    """A batch is a list: the images of a batch differ in shape."""
    return pairs
