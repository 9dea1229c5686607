from __future__ import annotations

import numpy as np
import torch
from conftest import blobs

from patchreg.datasets import ManifestDataModule, PairDataModule, SynthesisDataModule
from patchreg.spatial import Grid

GRID = Grid.aligned((0, 0, 0), (9, 8, 7), (1.0, 2.0, 3.0))


def manifest(folder, save_volume, columns="image,labels,split", row="a.nii.gz,l.nii.gz,train"):
    save_volume(blobs(GRID), "a.nii.gz")
    save_volume(blobs(GRID), "l.nii.gz", np.int16)
    (folder / "manifest.csv").write_text(f"{columns}\n{row}\n")
    return str(folder / "manifest.csv")


def test_a_header_tells_the_grid_and_the_manifest_whether_there_are_labels(tmp_path, save_volume):
    found = ManifestDataModule(manifest(tmp_path, save_volume)).example()
    assert found.grid.shape == GRID.shape
    assert found.grid.spacing == GRID.spacing
    assert found.labels == torch.int32
    assert "a.nii.gz" in found.source
    alone = ManifestDataModule(manifest(tmp_path, save_volume, "image", "a.nii.gz")).example()
    assert alone.labels is None


def test_pairs_and_an_atlas_tell_the_fixed_image(tmp_path, save_volume):
    path = manifest(tmp_path, save_volume, "fixed,moving", "a.nii.gz,l.nii.gz")
    assert ManifestDataModule(path).example().grid.shape == GRID.shape
    atlas = save_volume(blobs(Grid.aligned((0, 0, 0), (5, 5, 5), 1.0)), "atlas.nii.gz")
    data = ManifestDataModule(manifest(tmp_path, save_volume), pairing="to-atlas", atlas=str(atlas))
    assert data.example().grid.shape == (5, 5, 5)


def test_what_is_not_there_is_said_and_no_error(tmp_path):
    found = ManifestDataModule(str(tmp_path / "none.csv")).example()
    assert found.grid is None
    assert "none.csv" in found.source
    (tmp_path / "gone.csv").write_text("labels\ngone.nii.gz\n")
    found = SynthesisDataModule(str(tmp_path / "gone.csv")).example()
    assert found.grid is None
    assert "gone.nii.gz" in found.source
    assert found.labels == torch.int16
    assert PairDataModule().example().grid is None


def test_made_images_are_at_most_as_large_as_told(tmp_path, save_volume):
    data = SynthesisDataModule(phantoms=6, phantom_spacing_mm=8.0, thin=2)
    pair = data.dataset("train")[0]
    told = data.example()
    assert all(a <= b for a, b in zip(pair.fixed_labels.grid.shape, told.grid.shape, strict=True))
    assert pair.fixed_labels.grid.spacing == told.grid.spacing
    assert pair.fixed_labels.data.dtype == told.labels
    found = SynthesisDataModule(manifest(tmp_path, save_volume), thin=2).example()
    assert found.grid.spacing[0] == 9 / 4  # half of nine voxels
