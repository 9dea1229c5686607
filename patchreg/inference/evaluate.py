"""Dice and folding from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from patchreg.errors import InputError
from patchreg.io import read_image, read_transform
from patchreg.losses import dice
from patchreg.losses.points import mean_finite
from patchreg.spatial import folding_percent, jacobian_determinant


def evaluate_files(fixed_labels: Any, moved_labels: Any, displacement: Path | None = None) -> dict[str, Any]:
    """Overlap of two label maps on one grid, and how regular a displacement is.

    Args:
        fixed_labels: label map of the fixed image.
        moved_labels: label map on the same grid, such as ``moved_labels.nii.gz``.
        displacement: an ITK displacement field or transform.

    Returns:
        ``dice_mean``, over the labels that either map has except 0; ``dice`` by label; and with a displacement
        ``folding_percent``, ``log_jacobian_std`` (where nothing folds) and ``displacement_mean_mm``.

    Raises:
        InputError: files that cannot be used, or label maps on different grids.
    """
    fixed, moved = read_image(fixed_labels, "labels"), read_image(moved_labels, "labels")
    a, b = fixed.volume.grid, moved.volume.grid
    if a.shape != b.shape or float((a.affine - b.affine).abs().max()) > 1e-3:
        raise InputError(
            f"{moved.path}: lies on another grid than {fixed.path}; resample it with patchreg apply --reference {fixed.path} "
            "--interpolation label"
        )
    labels = sorted(set(torch.unique(fixed.volume.data).tolist()) | set(torch.unique(moved.volume.data).tolist()))
    labels = [v for v in labels if v > 0]
    if not labels:
        raise InputError(f"{fixed.path} and {moved.path}: have no label but 0")
    values = dice(fixed.volume.data, moved.volume.data, labels).tolist()
    found: dict[str, Any] = {
        "dice_mean": mean_finite(values),
        "labels": len(labels),
        "dice": {str(label): value for label, value in zip(labels, values, strict=True)},
    }
    if displacement is not None:
        mapped = read_transform(displacement).on(a)
        determinant = jacobian_determinant(mapped)
        positive = determinant[determinant > 0]
        found["folding_percent"] = folding_percent(determinant)
        found["log_jacobian_std"] = float(positive.log().std()) if positive.numel() > 1 else 0.0
        found["displacement_mean_mm"] = float(mapped.total_displacement_mm().norm(dim=1).mean())
    return found
