"""How good a registration is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from patchreg import ops
from patchreg.cascade import PreparedPair, Result
from patchreg.losses import dice
from patchreg.losses.overlap import LabelSet
from patchreg.losses.points import centroid_distance_mm, mean_finite
from patchreg.spatial import Grid, Transform, folding_percent, jacobian_determinant

EVALUATION_MM = 2.0


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a registration reached on one pair.

    Args:
        pair: the images.
        result: what was found.
        metrics: ``similarity`` and ``similarity_before`` (local normalised cross correlation), ``folding_percent``,
            ``jacobian_std`` (of the log-Jacobian); with labels ``dice``, ``dice_before``, ``dice_affine`` and
            ``centroids_mm``.
    """

    pair: PreparedPair
    result: Result
    metrics: dict[str, float]


@torch.no_grad()
def evaluate(pair: PreparedPair, result: Result, labels: Sequence[int] | None) -> Evaluation:
    """Measure on a lattice of 2 mm over the fixed image's content.

    Args:
        pair: the images, with label maps where there are any.
        result: what the cascade found.
        labels: label values that Dice is a mean over.
    """
    content = pair.fixed.content
    size = ((content.high_mm - content.low_mm) / EVALUATION_MM).ceil().clamp(min=2).long().tolist()
    grid = Grid.aligned((content.low_mm + content.high_mm) / 2, size, EVALUATION_MM)
    fixed = pair.fixed_warp.on(grid).sample(pair.fixed.at(EVALUATION_MM))
    mapped = result.transform.on(grid)
    moving = pair.moving.at(EVALUATION_MM)
    determinant = jacobian_determinant(mapped)
    metrics = {
        "similarity": float(ops.lncc(fixed, mapped.sample(moving))),
        "similarity_before": float(ops.lncc(fixed, pair.initial.on(grid).sample(moving))),
        "folding_percent": folding_percent(determinant),
        "jacobian_std": float(determinant.clamp(min=1e-3).log().std()),
    }
    if labels and pair.fixed.labels is not None and pair.moving.labels is not None:
        for name, transform in (
            ("dice", result.transform),
            ("dice_before", pair.initial),
            ("dice_affine", result.affine),
        ):
            metrics[name] = mean_dice(pair, transform, grid, labels)
        distance = centroid_distance_mm(
            pair.fixed.labels.at(2.0), pair.moving.labels.at(2.0), pair.fixed_warp, result.transform, LabelSet(labels)
        )
        metrics["centroids_mm"] = float(distance)
    return Evaluation(pair, result, metrics)


def mean_dice(pair: PreparedPair, transform: Transform, grid: Grid, labels: Sequence[int]) -> float:
    """Dice of the labels at the points of a lattice, nearest neighbours, averaged over the labels in sight."""
    assert pair.fixed.labels is not None
    assert pair.moving.labels is not None
    fixed = pair.fixed_warp.on(grid).sample(pair.fixed.labels.volume, mode="nearest")
    moved = transform.on(grid).sample(pair.moving.labels.volume, mode="nearest")
    return mean_finite(dice(fixed, moved, labels).tolist())
