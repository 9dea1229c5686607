"""Everything on a made pair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from patchreg.datasets.augmentation import WorldAugmentation
from patchreg.datasets.files import augmented
from patchreg.datasets.phantom import BRAIN_LABELS, LEFT, RIGHT, phantom
from patchreg.datasets.synthesis import Synthesis
from patchreg.inference.evaluate import evaluate_files
from patchreg.inference.pipeline import register
from patchreg.inference.pretrained import DEFAULT_MODEL
from patchreg.inference.registration import resample
from patchreg.io import staged_folder
from patchreg.spatial import Affine, Grid, MappedGrid, Volume, foreground
from patchreg.types import Interpolation, Progress


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Args:
        folder: where everything is.
        dice_before: of the made labels, as the files lie.
        dice_affine: after the affine part.
        dice_after: after the whole transform.
        summary: of the registration.
    """

    folder: Path
    dice_before: float
    dice_affine: float
    dice_after: float
    summary: dict[str, Any]


def make_pair(seed: int, spacing_mm: float = 2.0) -> tuple[tuple[Volume, Volume], tuple[Volume, Volume]]:
    """Two heads of T1-like contrast, the second turned, shifted and stored as LIA with 1.5 x 2 x 2.5 mm voxels.

    Returns:
        (image, labels) of the fixed head, and of the moving one.
    """
    generator = torch.Generator().manual_seed(seed)
    synthesis = Synthesis(thick_probability=0.0, blur_mm=0.5, bias=0.2, noise=0.04, gamma=0.0)
    contrast = _t1_contrast()
    made = []
    for head in (2 * seed, 2 * seed + 1):
        labels = phantom(head, spacing_mm)
        made.append((synthesis.make(labels, contrast, False, generator), labels))
    (fixed, fixed_labels), (moving, moving_labels) = made
    turn = WorldAugmentation(rotation_deg=12, translation_mm=12, scaling=0.08)
    pair = augmented(fixed, moving, fixed_labels, moving_labels, WorldAugmentation(), generator, "")
    affine = turn.draw_affine(foreground(moving).center_mm, generator)
    moved = [_stored_differently(Volume(v.data, v.grid.moved(affine.matrix), v.name)) for v in (moving, moving_labels)]
    return (pair.fixed, fixed_labels), (moved[0], moved[1])


def run_demo(
    folder: Path,
    seed: int = 0,
    model: str = DEFAULT_MODEL,
    refine: bool | None = None,
    progress: Progress | None = None,
) -> Demo:
    """Make a pair of heads, register them, measure, and write it all.

    Args:
        folder: gets ``fixed.nii.gz``, ``moving.nii.gz``, their labels, and every output of a registration.
        seed: which heads.
        model: of the zoo, or a folder.
        refine: whether the result is optimised on the pair; None: as :func:`register` decides.
        progress: called with the step's name, parts done and parts in all.

    Raises:
        OutputError: the folder cannot be written.
    """
    with staged_folder(folder) as out:
        (fixed, fixed_labels), (moving, moving_labels) = make_pair(seed)
        for name, volume in (
            ("fixed", fixed),
            ("fixed_labels", fixed_labels),
            ("moving", moving),
            ("moving_labels", moving_labels),
        ):
            array = volume.data[0].numpy()
            array = (array * 1000).astype(np.int16) if name in ("fixed", "moving") else array.astype(np.int16)
            nib.save(nib.Nifti1Image(array, volume.grid.affine.numpy()), out / f"{name}.nii.gz")
        found = register(
            out / "fixed.nii.gz",
            out / "moving.nii.gz",
            model,
            refine=refine,
            moving_labels=out / "moving_labels.nii.gz",
            seed=seed,
            progress=progress,
        )
        found.summary["fixed"], found.summary["moving"] = "fixed.nii.gz", "moving.nii.gz"
        found.write(out)
        after = evaluate_files(out / "fixed_labels.nii.gz", out / "moved_labels.nii.gz")
        scores = []
        for transform in (Affine.identity(), found.affine):
            labels = resample(moving_labels, transform, fixed_labels.grid, "label")
            scores.append(_brain_dice(fixed_labels, labels))
        brain = [after["dice"].get(str(label), float("nan")) for label in BRAIN_LABELS]
        dice_after = float(np.nanmean(brain))
    return Demo(folder, scores[0], scores[1], dice_after, found.summary)


def _brain_dice(fixed: Volume, moved: Volume) -> float:
    from patchreg.losses import dice

    return float(np.nanmean(dice(fixed.data, moved.data, BRAIN_LABELS).numpy()))


def _t1_contrast() -> torch.Tensor:
    contrast = torch.zeros(600)
    tissue = {
        "wm": 0.9, "cortex": 0.6, "ventricle": 0.15, "cerebellum_wm": 0.88, "cerebellum": 0.62, "thalamus": 0.75,
        "caudate": 0.66, "putamen": 0.68, "pallidum": 0.8, "hippocampus": 0.6, "amygdala": 0.58,
    }  # fmt: skip
    for name, value in tissue.items():
        contrast[LEFT[name]] = contrast[RIGHT[name]] = value
    for label, value in ((14, 0.15), (16, 0.85), (24, 0.12), (515, 0.2), (516, 0.7)):
        contrast[label] = value
    return contrast


def _stored_differently(volume: Volume) -> Volume:
    """The same content on a grid of other orientation and voxel sizes."""
    direction = torch.tensor([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64)
    low, high = volume.grid.bounds()
    spacing = torch.tensor([1.5, 2.0, 2.5], dtype=torch.float64)
    size = (direction.T @ (high - low)).abs()
    shape = (size / spacing).ceil().long()
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = (low + high) / 2 - affine[:3, :3] @ ((shape - 1) / 2).double()
    grid = Grid(shape.tolist(), affine)
    mode: Interpolation = "linear" if volume.data.is_floating_point() else "label"
    return Volume(MappedGrid.identity(grid).sample(volume, mode=mode)[0], grid, volume.name)
