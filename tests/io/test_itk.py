from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import blobs, known_transform, oriented_grid

from patchreg.errors import InputError
from patchreg.inference.registration import displacement_on, resample
from patchreg.io import read_image, read_transform, write_transform, write_vectors
from patchreg.spatial import Affine, Composite, DisplacementField, VelocityField


def random_points(count=50, half_mm=30):
    return np.random.default_rng(0).uniform(-half_mm, half_mm, (count, 3))


def test_itk_maps_points_as_we_do(tmp_path, tolerances):
    """The order of the chain, the LPS world, and the fields' grids, all at once."""
    transform = known_transform(size_mm=6.0)
    write_transform(tmp_path / "t.h5", transform)
    itk = sitk.ReadTransform(str(tmp_path / "t.h5"))
    ras = random_points()
    lps = ras * [-1, -1, 1]
    theirs = np.array([itk.TransformPoint(p) for p in lps]) * [-1, -1, 1]
    assert np.abs(transform(torch.from_numpy(ras)).numpy() - theirs).max() < tolerances.points_mm


@pytest.mark.parametrize("moving", ["RAS", "LAS", "LPS", "oblique"])
def test_itk_resamples_as_we_do(oriented, moving, save_volume, tmp_path, tolerances):
    """The acceptance test of the files: SimpleITK with our transform gives our moved image, edges and all."""
    fixed_path = save_volume(blobs(oriented, seed=1), "fixed.nii.gz")
    moving_path = save_volume(blobs(oriented_grid(moving, (2.0, 1.5, 2.5)), seed=2), "moving.nii.gz")
    transform = known_transform(size_mm=6.0)
    write_transform(tmp_path / "t.h5", transform)
    fixed, image = read_image(fixed_path), read_image(moving_path)
    ours = resample(image.volume, transform, fixed.volume.grid).data[0].numpy()
    theirs = sitk.Resample(
        sitk.ReadImage(str(moving_path), sitk.sitkFloat32),
        sitk.ReadImage(str(fixed_path), sitk.sitkFloat32),
        sitk.ReadTransform(str(tmp_path / "t.h5")),
        sitk.sitkLinear,
        0.0,
    )
    difference = np.abs(sitk.GetArrayFromImage(theirs).transpose(2, 1, 0) - ours)
    close = difference <= tolerances.itk_intensity * float(image.volume.data.max())
    assert close.mean() > 0.9995  # a voxel whose point lies on the image's very edge may fall to either side
    assert (ours > 0).mean() > 0.1


def test_displacement_file_is_the_transform(oriented, save_volume, tmp_path, tolerances):
    fixed = read_image(save_volume(blobs(oriented), "fixed.nii.gz"))
    transform = known_transform(size_mm=6.0)
    write_vectors(tmp_path / "d.nii.gz", displacement_on(transform, fixed.volume.grid), fixed.volume.grid, fixed.header)
    field = sitk.ReadImage(str(tmp_path / "d.nii.gz"), sitk.sitkVectorFloat64)
    assert field.GetNumberOfComponentsPerPixel() == 3
    itk = sitk.DisplacementFieldTransform(field)
    inner = [(np.array(n) // 4, 3 * np.array(n) // 4) for n in oriented.shape]
    index = np.array([[np.random.default_rng(d).integers(a, b) for a, b in inner] for d in range(20)], dtype=float)
    ras = oriented.to_world(torch.from_numpy(index)).numpy()
    theirs = np.array([itk.TransformPoint(p) for p in ras * [-1, -1, 1]]) * [-1, -1, 1]
    assert np.abs(theirs - transform(torch.from_numpy(ras)).numpy()).max() < 10 * tolerances.points_mm
    back = read_transform(tmp_path / "d.nii.gz")
    assert np.abs(back(torch.from_numpy(ras)).numpy() - theirs).max() < tolerances.points_mm


def test_round_trip(tmp_path, tolerances):
    transform = known_transform()
    write_transform(tmp_path / "t.h5", transform)
    again = read_transform(tmp_path / "t.h5")
    x = torch.from_numpy(random_points())
    assert [type(t) for t in again.transforms] == [DisplacementField, Affine]
    assert (again(x) - transform(x)).abs().max() < tolerances.points_mm


@pytest.mark.parametrize("suffix", [".tfm", ".txt", ".mat"])
def test_other_linear_files_are_read(tmp_path, suffix):
    rigid = sitk.Euler3DTransform()
    rigid.SetCenter((1, 2, 3))
    rigid.SetRotation(0.1, -0.2, 0.3)
    rigid.SetTranslation((4, 5, 6))
    affine = sitk.AffineTransform(rigid.GetMatrix(), (4, 5, 6), (1, 2, 3))
    sitk.WriteTransform(affine if suffix == ".mat" else rigid, str(tmp_path / f"t{suffix}"))
    ras = random_points(5)
    theirs = np.array([rigid.TransformPoint(p) for p in ras * [-1, -1, 1]]) * [-1, -1, 1]
    assert np.abs(read_transform(tmp_path / f"t{suffix}")(torch.from_numpy(ras)).numpy() - theirs).max() < 1e-4


@pytest.mark.reference_tool
def test_nitransforms_reads_our_fields(oriented, save_volume, tmp_path):
    nitransforms = pytest.importorskip("nitransforms")
    fixed = read_image(save_volume(blobs(oriented), "fixed.nii.gz"))
    transform = known_transform(size_mm=6.0)
    write_vectors(tmp_path / "d.nii.gz", displacement_on(transform, fixed.volume.grid), fixed.volume.grid, fixed.header)
    field = nitransforms.nonlinear.DenseFieldTransform.from_filename(tmp_path / "d.nii.gz", fmt="itk")
    points = oriented.to_world(torch.tensor([[10.0, 10, 10], [15, 12, 9]])).numpy()
    assert np.abs(field.map(points) - transform(torch.from_numpy(points)).numpy()).max() < 0.05


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    (tmp_path / "bad.h5").write_text("no transform")
    (tmp_path / "bad.png").write_text("no transform")
    bspline = sitk.BSplineTransform(3, 3)
    sitk.WriteTransform(bspline, str(tmp_path / "bspline.h5"))
    flat = sitk.AffineTransform(2)
    sitk.WriteTransform(flat, str(tmp_path / "flat.tfm"))
    for name, says in (
        ("missing.h5", "no such file"),
        ("bad.h5", "not an ITK transform"),
        ("bad.png", "not a transform"),
        ("bspline.h5", "only linear transforms and displacement fields"),
        ("flat.tfm", "2-D transform"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            read_transform(tmp_path / name)
        assert name in str(caught.value)
    field = known_transform().transforms[0]
    with pytest.raises(InputError, match="VelocityField cannot be written"):
        write_transform(tmp_path / "v.h5", Composite([VelocityField(field.grid, field.displacement_mm)]))
    with pytest.raises(InputError, match="end the name in .h5"):
        write_transform(tmp_path / "t.png", Affine.identity())
