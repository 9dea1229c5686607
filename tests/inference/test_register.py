from __future__ import annotations

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from cascade_parts import small_cascade
from inference_parts import brain_points, head, head_grid, known_pair, save

import patchreg
from patchreg.cascade import PatchCascade, Stage
from patchreg.errors import InputError
from patchreg.inference.initial import starting_points
from patchreg.inference.pipeline import find_device
from patchreg.inference.refine import Refinement
from patchreg.io import read_image, read_transform
from patchreg.losses import target_error_mm
from patchreg.networks import VoxelMorph
from patchreg.spatial import Affine, Composite, DisplacementField, Grid, Volume, collapse

QUICK = Refinement(spacings_mm=(5.0, 3.0), iterations=(30, 25), regularity=0.2)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A head stored as RAS, the same head deformed and stored as oblique, and the transform between them."""
    folder = tmp_path_factory.mktemp("pair")
    fixed, moving, truth = known_pair(head_grid("RAS", (3.0, 3.0, 3.0)), head_grid("oblique", (2.5, 3.0, 3.5)))
    return save(fixed, folder / "fixed.nii.gz", np.int16), save(moving, folder / "moving.nii.gz", np.int16), truth


@pytest.fixture(scope="module")
def found(pair):
    return patchreg.register(pair[0], pair[1], small_cascade(), refinement=QUICK)


def test_a_known_displacement_is_found(pair, found):
    points = brain_points()
    errors = target_error_mm(found.transform, points, pair[2](points))
    assert target_error_mm(Affine.identity(), points, pair[2](points)).mean() > 4
    assert errors.mean() < 0.8
    assert found.summary["folding_percent"] < 0.1
    similarity = found.summary["similarity"]
    assert similarity["before"] < similarity["affine"] < similarity["after"]


@pytest.mark.parametrize("storage", ["LAS", "LPS", "LIA", "oblique", "thick"])
def test_the_same_pair_stored_otherwise_gives_the_same_world_transform(pair, found, storage, tmp_path):
    """RAS, LAS, LPS, LIA, oblique, and voxels of 3 x 3 x 6 mm: what differs is what resampling the images costs.

    Limits in mm, mean and worst, at voxels of 3 mm and more: reversed axes cost nothing, other voxels a fifth of one.
    """
    grids = {
        "oblique": (head_grid("oblique", (3.0, 3.0, 3.0)), head_grid("oblique", (3.0, 3.0, 3.0))),
        "thick": (head_grid("RAS", (3.0, 3.0, 6.0)), head_grid("oblique", (2.5, 3.0, 6.0))),
    }
    if storage in grids:
        fixed, moving = grids[storage]
    else:
        fixed, moving = head_grid(storage, (3.0, 3.0, 3.0)), head_grid("oblique", (2.5, 3.0, 3.5))
    images = known_pair(fixed, moving)[:2]
    files = [save(v, tmp_path / f"{n}.nii.gz", np.int16) for v, n in zip(images, ("fixed", "moving"), strict=True)]
    other = patchreg.register(*files, small_cascade(), refinement=QUICK)
    points = brain_points()
    difference = (other.transform(points) - found.transform(points)).norm(dim=1)
    mean_limit, worst_limit = {"oblique": (0.6, 3.0), "thick": (1.0, 6.0)}.get(storage, (0.02, 0.2))
    assert difference.mean() < mean_limit
    assert difference.max() < worst_limit


def test_all_outputs_are_there_and_agree(pair, found, tmp_path, tolerances):
    fixed_path, moving_path, _ = pair
    folder = found.save(tmp_path / "out")
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "moved.nii.gz",
        "transform.h5",
        "displacement.nii.gz",
        "inverse_displacement.nii.gz",
        "summary.json",
        "report.html",
        "uncertainty.nii.gz",
    }
    fixed, moved = nib.load(fixed_path), nib.load(folder / "moved.nii.gz")
    assert moved.shape == fixed.shape
    assert np.allclose(moved.affine, fixed.affine, atol=1e-5)
    assert moved.get_data_dtype() == np.int16
    theirs = sitk.Resample(
        sitk.ReadImage(str(moving_path), sitk.sitkFloat32),
        sitk.ReadImage(str(fixed_path), sitk.sitkFloat32),
        sitk.ReadTransform(str(folder / "transform.h5")),
        sitk.sitkLinear,
        0.0,
    )
    ours = found.moved().data[0].numpy()
    difference = np.abs(sitk.GetArrayFromImage(theirs).transpose(2, 1, 0) - ours)
    assert np.mean(difference <= tolerances.itk_intensity * ours.max()) > 0.9995
    points = brain_points(300)
    for name in ("transform.h5", "displacement.nii.gz"):
        assert (read_transform(folder / name)(points) - found.transform(points)).norm(dim=1).max() < 0.15
    there = found.transform(points)
    back = read_transform(folder / "inverse_displacement.nii.gz")(there)
    assert (back - points).norm(dim=1).mean() < 0.05
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["inverse_residual_mm"]["mean"] < 0.02
    assert summary["seed"] == 0
    assert summary["peak_memory_mib"]["host"] > 100
    assert set(summary["seconds"]) == {"read", "load model", "prepare", "affine", "cascade", "refine", "collapse"}
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "moving.nii.gz onto fixed.nii.gz" in page


def test_labels_stay_labels(tmp_path):
    image, labels = head(spacing_mm=4.0)
    labels.data[labels.data == 3] = 1003
    files = [save(image, tmp_path / "image.nii.gz"), save(labels, tmp_path / "labels.nii.gz", np.float32)]
    found = patchreg.register(files[0], files[0], small_cascade(), refine=False, moving_labels=files[1])
    moved = found.moved_labels()
    assert moved.data.dtype == torch.int32
    assert set(moved.data.unique().tolist()) <= set(labels.data.unique().tolist())
    folder = found.save(tmp_path / "out")
    stored = nib.load(folder / "moved_labels.nii.gz")
    assert stored.get_data_dtype() == np.float32
    assert 1003 in np.unique(stored.get_fdata())
    with pytest.raises(ValueError, match="no moving labels"):
        patchreg.register(files[0], files[0], small_cascade(), refine=False).moved_labels()


@pytest.mark.parametrize("kind", ["rigid", "affine"])
def test_linear_transforms(pair, kind):
    found = patchreg.register(pair[0], pair[1], small_cascade(), transform=kind)
    assert len(found.transform.transforms) == 1
    linear = found.affine.matrix[:3, :3]
    gap = (linear @ linear.T - torch.eye(3).double()).abs().max()
    assert (gap < 1e-9) == (kind == "rigid")
    points = brain_points()
    errors = target_error_mm(found.transform, points, pair[2](points))
    assert errors.mean() < {"rigid": 5.0, "affine": 2.6}[kind]
    assert found.summary["folding_percent"] == 0


def test_images_that_do_not_overlap_are_centred(pair, caplog, tmp_path):
    moving = nib.load(pair[1])
    shift = np.eye(4)
    shift[:3, 3] = [400, -300, 200]
    far = tmp_path / "far.nii.gz"
    nib.save(nib.Nifti1Image(np.asarray(moving.dataobj), shift @ moving.affine), far)
    with caplog.at_level(logging.WARNING):
        found = patchreg.register(pair[0], far, small_cascade(), transform="affine")
    assert "do not overlap in the world" in caplog.text
    assert "far.nii.gz" in caplog.text
    points = brain_points()
    truth = Composite([pair[2], Affine(shift)])
    assert target_error_mm(found.transform, points, truth(points)).mean() < 2.6


def test_headers_that_are_wrong_are_got_over(pair, tmp_path):
    """Overlapping boxes but 50 mm apart: the centres of mass lead to the better affine map."""
    moving = nib.load(pair[1])
    shift = np.eye(4)
    shift[:3, 3] = [0, 50, -30]
    nib.save(nib.Nifti1Image(np.asarray(moving.dataobj), shift @ moving.affine), tmp_path / "shifted.nii.gz")
    found = patchreg.register(pair[0], tmp_path / "shifted.nii.gz", small_cascade(), transform="affine")
    assert found.summary["start"] == "centres of mass"
    points = brain_points()
    assert target_error_mm(found.transform, points, Composite([pair[2], Affine(shift)])(points)).mean() < 2.6


def test_an_initial_transform_is_where_it_starts(pair):
    found = patchreg.register(pair[0], pair[1], small_cascade(), refine=False, initial_transform=pair[2])
    points = brain_points()
    assert found.summary["start"] == "given"
    assert target_error_mm(found.transform, points, pair[2](points)).mean() < 1.0  # untrained networks add little


def test_same_seed_same_result(pair):
    cascade = PatchCascade([Stage(VoxelMorph((4, 8), (8,), ()), patch_shape=24, spacing=4.0, passes=2)])
    torch.nn.init.normal_(cascade.stages[0].network.flow.weight, std=0.2)
    found = [patchreg.register(pair[0], pair[1], cascade, refine=False, seed=seed) for seed in (0, 0, 1)]
    fields = [f.transform.transforms[0].displacement_mm for f in found]
    assert torch.equal(fields[0], fields[1])
    assert not torch.equal(fields[0], fields[2])
    assert found[0].uncertainty is not None


def test_collapsed_transforms_are_the_chain(oriented):
    from conftest import known_transform

    chain = Composite([known_transform(1), known_transform(2)])
    flat = collapse(chain, oriented)
    assert [type(t) for t in flat.transforms] == [DisplacementField, Affine]
    points = 0.8 * oriented.points().reshape(-1, 3)[::97]
    assert (flat(points) - chain(points)).norm(dim=1).max() < 0.15
    grid = flat.transforms[0].grid
    assert bool(grid.contains(oriented.points(), margin_voxels=0.0).all())  # no voxel of the image lies outside it
    linear = collapse(Composite([Affine.identity(), Affine.translation((1.0, 2, 3))]), oriented)
    assert len(linear.transforms) == 1


def test_sheared_images_get_a_field_that_itk_can_have():
    affine = torch.tensor([[2.0, 0.6, 0, -20], [0, 2, 0, -20], [0, 0, 2, -20], [0, 0, 0, 1]])
    from conftest import known_transform

    flat = collapse(known_transform(), Grid((20, 20, 20), affine))
    direction = flat.transforms[0].grid.direction
    assert torch.allclose(direction.T @ direction, torch.eye(3).double())


def test_torchio_and_nibabel_images(tmp_path):
    import torchio as tio

    image, _ = head(spacing_mm=6.0)
    subject = tio.ScalarImage(tensor=image.data, affine=image.grid.affine.numpy())
    nifti = nib.Nifti1Image(image.data[0].numpy(), image.grid.affine.numpy())
    found = patchreg.register(subject, nifti, small_cascade(), transform="affine", refine=False)
    assert found.moved().grid.shape == image.grid.shape


def test_starting_points():
    from cascade_parts import prepared

    image, _ = head(spacing_mm=6.0)
    near = prepared(Volume(image.data, image.grid.moved(Affine.translation((2.0, 0, 0)).matrix)))
    assert [name for name, _ in starting_points(prepared(image), near)] == ["headers"]


def test_bad_settings(pair):
    with pytest.raises(InputError, match="transform must be"):
        patchreg.register(pair[0], pair[1], small_cascade(), transform="similarity")
    with pytest.raises(InputError, match="device 'tpu9' is unknown"):
        find_device("tpu9")
    with pytest.raises(InputError, match="device 'meta' is not supported"):
        find_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch sees no GPU"):
            find_device("cuda")


def test_reading_checks_masks_and_labels(pair, tmp_path):
    empty = nib.load(pair[0])
    nib.save(nib.Nifti1Image(np.zeros(empty.shape, np.uint8), empty.affine), tmp_path / "empty.nii.gz")
    with pytest.raises(InputError, match="empty.nii.gz: the mask is empty"):
        patchreg.register(pair[0], pair[1], small_cascade(), fixed_mask=tmp_path / "empty.nii.gz")
    assert read_image(pair[0], "labels").volume.data.dtype == torch.int32
