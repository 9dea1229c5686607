"""Distances between corresponding points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from patchreg.fake import is_fake
from patchreg.losses.overlap import LabelSet
from patchreg.spatial import Transform, Volume


def label_centroids(volume: Volume, labels: LabelSet) -> Tensor:
    """World positions of the centres of labels, (L, 3) mm, float64; NaN for a label that is absent.

    In a map without numbers (:mod:`patchreg.fake`) all lie in the middle.
    """
    if is_fake(volume.data):
        return volume.grid.center.expand(len(labels), 3)
    index = labels.index(volume.data[0].cpu())
    where = (index < len(labels)).nonzero()
    which = index[where[:, 0], where[:, 1], where[:, 2]]
    sums = torch.zeros(len(labels), 3, dtype=torch.float64).index_add_(0, which, where.double())
    counts = torch.bincount(which, minlength=len(labels)).double()[:, None]
    sums = volume.grid.to_world(sums / counts.clamp(min=1)) * counts
    sums, counts = volume.grid.add_up(torch.cat([sums, counts], dim=1)).split([3, 1], dim=1)
    return torch.where(counts > 0, sums / counts.clamp(min=1), torch.nan)


def centroid_distance_mm(
    fixed: Volume, moving: Volume, fixed_warp: Transform, transform: Transform, labels: LabelSet
) -> Tensor:
    """The mean distance in mm between moved centres of the fixed labels and those of the moving labels.

    A target for affine stages: unlike overlap it pulls from any distance.

    Args:
        fixed: label map (1, I, J, K).
        moving: label map, on a grid of its own.
        fixed_warp: the fixed image is seen through it.
        transform: the whole chain, from where the fixed image is seen to the moving image.
        labels: which labels; those absent from either image do not count.
    """
    start, end = label_centroids(fixed, labels), label_centroids(moving, labels)
    common = torch.isfinite(start).all(dim=1) & torch.isfinite(end).all(dim=1)
    if not bool(common.any()):
        return torch.zeros((), dtype=torch.float64)
    start, end = start[common], end[common]
    with torch.no_grad():
        seen = _pull_back(fixed_warp, start)
    return (transform(seen) - end).norm(dim=1).mean()


def _pull_back(transform: Transform, points: Tensor, iterations: int = 20) -> Tensor:
    """``x`` with ``T(x)`` = ``points``, by fixed-point iteration; for transforms near the identity."""
    x = points
    for _ in range(iterations):
        x = x - (transform(x) - points)
    return x


def target_error_mm(transform: Transform, fixed_points: Tensor, moving_points: Tensor) -> Tensor:
    """Distances (N,) in mm between ``T`` of fixed points (N, 3) and corresponding moving points (N, 3)."""
    return (transform(fixed_points) - moving_points).norm(dim=1)


def mean_finite(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN where there are none."""
    kept = [v for v in values if not math.isnan(v)]
    return sum(kept) / len(kept) if kept else float("nan")
