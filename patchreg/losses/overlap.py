"""Overlap of label maps, without ever making a one-hot volume."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from patchreg.errors import InputError
from patchreg.fake import is_fake
from patchreg.ops.warp.reference import coordinates
from patchreg.spatial import MappedGrid, Volume


class LabelSet:
    """The labels that count.

    Args:
        labels: label values; everything else is background.

    Raises:
        InputError: no labels, repeated or negative ones.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        values = [int(v) for v in labels]
        if not values or min(values) < 0 or len(set(values)) != len(values):
            raise InputError(f"labels must be different whole numbers from 0 up, got {list(labels)}")
        self.labels = tuple(values)
        self._table = torch.full((max(values) + 2,), len(values), dtype=torch.int64)
        self._table[torch.tensor(values)] = torch.arange(len(values))

    def __len__(self) -> int:
        return len(self.labels)

    def index(self, values: Tensor) -> Tensor:
        """The place of each label in the set, int64; ``len(self)`` for all others."""
        last = self._table.numel() - 1
        outside = (values < 0) | (values > last)
        return self._table.to(values.device)[torch.where(outside, last, values).long()]


class SoftDice:
    """``1 - mean Dice`` of fixed labels and moving labels seen through a transform, over the labels in sight.

    A moving label's membership at a point is the linear weight of the neighbouring voxels that have it, as warping
    one-hot maps gives; but only the sums that Dice is made of are formed, so the cost does not grow with the number
    of labels.

    Args:
        labels: the labels that count.
        smooth: voxels added to numerator and denominator.

    References:
        Hoffmann et al. 2022 (SynthMorph), arXiv:2004.10282, eq. (3); Milletari et al. 2016, arXiv:1606.04797.
    """

    def __init__(self, labels: LabelSet, smooth: float = 1.0) -> None:
        self.labels, self.smooth = labels, smooth

    def __call__(
        self, fixed: Sequence[tuple[MappedGrid, Volume]], moving: Sequence[tuple[MappedGrid, Volume]]
    ) -> Tensor:
        """For N patches, their points in the fixed and in the moving image with the label maps; a scalar."""
        sums = [overlap_sums(f, fl, m, ml, self.labels) for (f, fl), (m, ml) in zip(fixed, moving, strict=True)]
        both, sizes = (torch.stack(s).sum(dim=0) for s in zip(*sums, strict=True))
        present = sizes > 0
        dice = (2 * both + self.smooth) / (sizes + self.smooth)
        return 1 - (dice * present).sum() / present.sum().clamp(min=1)


def overlap_sums(
    fixed_points: MappedGrid, fixed_labels: Volume, points: MappedGrid, moving_labels: Volume, labels: LabelSet
) -> tuple[Tensor, Tensor]:
    """For each label the shared voxels, and the voxels in both images added up: (L,) and (L,).

    Args:
        fixed_points: the patch in the fixed image.
        fixed_labels: (1, I, J, K) integers.
        points: the patch in the moving image; gradients pass to its displacement and matrix.
        moving_labels: (1, I, J, K) integers.
        labels: which labels.
    """
    count = len(labels) + 1
    with torch.no_grad():
        here = labels.index(fixed_points.sample(fixed_labels, mode="nearest")[0, 0]).flatten()
    where = _coordinates(points, moving_labels)[0].flatten(1)
    axes = [_neighbours(where[d], n) for d, n in enumerate(moving_labels.grid.shape)]
    i, j, k = reached = _reach(axes, points, moving_labels)
    seen = labels.index(moving_labels.data[0, i, j, k])  # what the patch reaches: memory depends on the patch alone
    axes = [[(voxel - part.start, weight) for voxel, weight in axis] for axis, part in zip(axes, reached, strict=True)]
    there, (_, columns, slices) = seen.flatten(), seen.shape
    sizes = torch.bincount(here, minlength=count).to(where.device, where.dtype)
    both = torch.zeros_like(sizes)
    for (vi, a), (vj, b), (vk, c) in itertools.product(*axes):
        label = there[(vi * columns + vj) * slices + vk]
        weight = a * b * c
        sizes = sizes.index_add(0, label, weight)
        both = both.index_add(0, label, weight * (label == here))
    return both[:-1], sizes[:-1]


def _coordinates(points: MappedGrid, labels: Volume) -> Tensor:
    """Index coordinates (1, 3, I, J, K) of the points in a label map."""
    affine, scale = points.index_map(labels.grid)
    d, device = points.displacement_mm, labels.device
    d = None if d is None else d.to(device)
    at, by = (m[None].to(device, torch.float32) for m in (affine, scale))
    return coordinates(d, at, by, points.grid.shape)


def _neighbours(position: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The voxels below and above positions along one dimension, and their linear weights: zero outside the image."""
    low = position.detach().floor()
    above = position - low
    found = []
    for voxel, weight in ((low, 1 - above), (low + 1, above)):
        inside = (voxel >= 0) & (voxel <= size - 1)
        found.append((voxel.clamp(0, size - 1).long(), weight * inside))
    return found


def _reach(axes: list[list[tuple[Tensor, Tensor]]], points: MappedGrid, labels: Volume) -> list[slice]:
    """Which part of a label map the neighbours of the points lie in."""
    if not is_fake(axes[0][0][0]):
        return [slice(min(int(v.min()) for v, _ in axis), max(int(v.max()) for v, _ in axis) + 1) for axis in axes]
    affine, _ = points.index_map(labels.grid)  # no numbers: as if nothing were displaced
    ends = list(itertools.product(*((0.0, n - 1.0) for n in points.grid.shape)))
    at = (torch.tensor(ends, dtype=affine.dtype) @ affine[:, :3].T + affine[:, 3]).detach()
    size = torch.tensor(labels.grid.shape, dtype=affine.dtype) - 1
    low, high = (torch.minimum(x.clamp(min=0), size) for x in (at.amin(0).floor(), at.amax(0).floor() + 1))
    return [slice(int(a), int(b) + 1) for a, b in zip(low, high, strict=True)]


def dice(fixed_labels: Tensor, moved_labels: Tensor, labels: Sequence[int]) -> Tensor:
    """Dice of two label maps of one shape, (L,); NaN for a label that neither has.

    References:
        Dice 1945, doi:10.2307/1932409.
    """
    chosen = LabelSet(labels)
    count = len(chosen) + 1
    a, b = chosen.index(fixed_labels).flatten(), chosen.index(moved_labels).flatten()
    both = torch.bincount(a[a == b], minlength=count)[:-1]
    sizes = (torch.bincount(a, minlength=count) + torch.bincount(b, minlength=count))[:-1]
    return torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), torch.nan)
