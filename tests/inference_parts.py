"""Made pairs with known answers, written as files."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from conftest import known_transform

from patchreg.datasets.phantom import phantom
from patchreg.datasets.synthesis import Synthesis
from patchreg.inference.demo import _t1_contrast
from patchreg.spatial import Composite, Grid, Volume

QUIET = Synthesis(thick_probability=0.0, blur_mm=1.5, bias=0.0, noise=0.0, gamma=0.0, texture=0.0)


def head(seed: int = 0, spacing_mm: float = 2.0) -> tuple[Volume, Volume]:
    """An image of T1-like contrast without noise, and its labels."""
    labels = phantom(seed, spacing_mm)
    image = QUIET.make(labels, _t1_contrast(), False, torch.Generator().manual_seed(seed))
    return Volume(image.data * 1000, image.grid, "head"), labels


def head_grid(orientation: str, spacing: tuple[float, float, float]) -> Grid:
    """A grid of any storage over the head."""
    from conftest import oriented_grid

    wide = oriented_grid(orientation, spacing, extent_mm=150.0 if orientation == "oblique" else 216.0)
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = torch.tensor([0.0, 0.0, -4.0])
    return wide.moved(shift)


def known_pair(fixed: Grid, moving: Grid, size_mm: float = 6.0, seed: int = 0) -> tuple[Volume, Volume, Composite]:
    """Two images of one head, and the transform that takes the first to the second: ``fixed(x) = moving(T(x))``."""
    from patchreg.inference.registration import resample
    from patchreg.spatial import Affine

    source, _ = head()
    truth = known_transform(seed=seed, size_mm=size_mm)
    return resample(source, truth, fixed), resample(source, Affine.identity(), moving), truth


def save(volume: Volume, path: Path, dtype: type = np.float32) -> Path:
    nib.save(nib.Nifti1Image(volume.data[0].numpy().astype(dtype), volume.grid.affine.numpy()), path)
    return path


def brain_points(count: int = 2000) -> torch.Tensor:
    """Points (N, 3) within the brain, where known transforms are not zero."""
    _, labels = head(spacing_mm=4.0)
    inside = (labels.data[0] > 0) & (labels.data[0] < 100)
    index = inside.nonzero()
    points = labels.grid.to_world(index[:: max(1, index.shape[0] // count)])
    return points[points.norm(dim=1) < 60]
