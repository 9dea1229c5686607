"""The result of a registration, and its files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchreg.inference.outputs import OutputFolder
from patchreg.inference.ranks import Ranks
from patchreg.io import Image, Storage, write_transform
from patchreg.spatial import (
    Affine,
    Composite,
    DisplacementField,
    Foreground,
    Grid,
    Transform,
    Volume,
    invert,
    jacobian_determinant,
)
from patchreg.types import Interpolation

SLAB_VOXELS = 2**22


@dataclass(frozen=True, eq=False)
class Registration:
    """A transform from the fixed to the moving image, with what belongs to it.

    Args:
        transform: ``Composite([D, A])``, a displacement field over the fixed image and then an affine map; world RAS mm.
        affine: the affine or rigid part alone.
        initial: where it started.
        fixed: the fixed image.
        moving: the moving image.
        moving_labels: the moving label map, if given.
        content: where the fixed image's content lies.
        uncertainty: standard deviation in mm between overlapping patches, on the last stage's lattice; None where
            nothing overlapped.
        summary: similarities, seconds by step, peak memory, folding, versions, seed, model.
        ranks: the processes that found it together. Where there are several, images and fields lie on their slabs
            (:class:`patchreg.distributed.slab.Slab`), and every method must be called by all.
    """

    transform: Composite
    affine: Affine
    initial: Transform
    fixed: Image
    moving: Image
    moving_labels: Image | None
    content: Foreground
    uncertainty: Volume | None
    summary: dict[str, Any] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)

    def moved(self) -> Volume:
        """The moving image on the fixed grid, float32, interpolated once."""
        return resample(self.moving.volume, self.transform, self.fixed.volume.grid)

    def moved_labels(self) -> Volume:
        """The moving labels on the fixed grid: every voxel has the label with the most weight around its point.

        Raises:
            ValueError: no labels were given.
        """
        if self.moving_labels is None:
            raise ValueError("no moving labels were given to register()")
        return resample(self.moving_labels.volume, self.transform, self.fixed.volume.grid, "label")

    def save(self, folder: str | Path) -> Path:
        """Write every output into a folder, which appears (or changes) only when all is written.

        ``moved.nii.gz``, ``moved_labels.nii.gz``, ``transform.h5``, ``displacement.nii.gz``,
        ``inverse_displacement.nii.gz``, ``uncertainty.nii.gz``, ``summary.json`` and ``report.html``.

        Several processes write the images each its slab, as ``.nii``, or ``.ome.zarr`` where the fixed image is; and
        ``affine.h5`` instead of ``transform.h5``, whose field one process would have to hold: ``displacement.nii`` is the
        whole transform.

        Raises:
            OutputError: the folder cannot be written, or the disk is full.
        """
        target = Path(folder)
        with self.ranks.folder(target) as out:
            self.write(out)
        return target

    def write(self, out: Path) -> None:
        """Write the files of :meth:`save` into a folder that exists, one after the other."""
        from patchreg.inference.report import report_page

        fixed, moving = self.fixed.volume.grid, self.moving.volume.grid
        folder = OutputFolder(out, self.ranks, self.fixed.path.rstrip("/").endswith(".zarr"))
        folder.image("moved", self.moved(), self.fixed.header, self.moving.storage)
        if self.moving_labels is not None:
            folder.image("moved_labels", self.moved_labels(), self.fixed.header, label_storage(self.moving_labels))
        name, linear = ("transform.h5", self.transform) if self.ranks.group is None else ("affine.h5", self.affine)
        folder.by_first(lambda path: write_transform(path / name, linear))
        folder.vectors("displacement", displacement_on(self.transform, fixed), fixed, self.fixed.header)
        back, residual = inverse_on(self.transform, moving)
        folder.vectors("inverse_displacement", back, moving, self.moving.header)
        if self.uncertainty is not None:
            folder.image("uncertainty", self.uncertainty, self.fixed.header)
        self.summary["inverse_residual_mm"] = residual
        page = report_page(self)
        folder.by_first(lambda path: _write_text(path, json.dumps(self.summary, indent=2) + "\n", page))


def _write_text(folder: Path, summary: str, page: str) -> None:
    (folder / "summary.json").write_text(summary)
    (folder / "report.html").write_text(page)


def label_storage(image: Image) -> Storage:
    """Labels are stored as they came, but never scaled and never as floats of a size that loses whole numbers."""
    return (
        image.storage
        if (image.storage.slope, image.storage.intercept) == (1.0, 0.0)
        else Storage(torch.zeros(1, dtype=torch.int32).numpy().dtype)
    )


def resample(volume: Volume, transform: Transform, grid: Grid, mode: Interpolation = "linear") -> Volume:
    """A volume through a transform on a grid, slab by slab.

    As in ITK, a point within half a voxel of the image takes the nearest voxel's value, and what lies further out is
    zero.
    """
    out = torch.empty((volume.data.shape[0], *grid.shape), dtype=volume.data.dtype)
    for where, slab in grid.slabs(SLAB_VOXELS):
        mapped = transform.on(slab)
        values = mapped.sample(volume, mode=mode, padding="border")
        out[:, *where] = torch.where(mapped.inside(volume.grid), values, torch.zeros((), dtype=values.dtype))[0]
    return Volume(out, grid, volume.name)


def displacement_on(transform: Transform, grid: Grid) -> Tensor:
    """``T(x) - x`` at every voxel of a grid, (1, 3, I, J, K) mm, slab by slab."""
    out = torch.empty((1, 3, *grid.shape))
    for where, slab in grid.slabs(SLAB_VOXELS):
        out[:, :, *where] = transform.on(slab).total_displacement_mm()
    return out


def inverse_on(transform: Transform, grid: Grid) -> tuple[Tensor, dict[str, float]]:
    """``T^-1(y) - y`` at every voxel of a grid, (1, 3, I, J, K) mm, and its residuals."""
    found = invert(transform, grid)
    return found.displacement_mm, {"mean": round(found.residual_mean_mm, 6), "max": round(found.residual_max_mm, 6)}


def folding_of(transform: Composite, grid: Grid) -> tuple[float, float]:
    """Percentage of folded voxels, and standard deviation of the log-Jacobian, over a grid."""
    fields = [t for t in transform.transforms if isinstance(t, DisplacementField)]
    if not fields:
        return 0.0, 0.0
    determinant = jacobian_determinant(transform.on(grid))
    voxels, folded = grid.whole.voxels, grid.add_up((determinant <= 0).sum(dtype=torch.float64))
    logarithm = determinant.clamp(min=1e-6).log_()
    mean = grid.add_up(logarithm.sum(dtype=torch.float64)) / voxels
    variance = grid.add_up((logarithm - mean.float()).square_().sum(dtype=torch.float64)) / max(1, voxels - 1)
    return 100 * float(folded) / voxels, float(variance.sqrt())
