from __future__ import annotations

import gzip
import logging

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torchio as tio
from conftest import blobs, oriented_grid

from patchreg.errors import GeometryError, InputError
from patchreg.io import Storage, read_grid, read_image, write_image
from patchreg.spatial import Grid, Volume


def nifti(array, affine=None, **header):
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    return image


def test_geometry_is_nibabels(oriented, save_volume):
    path = save_volume(blobs(oriented))
    read = read_image(path)
    assert read.volume.grid.shape == oriented.shape
    assert torch.allclose(read.volume.grid.affine, oriented.affine, atol=1e-4)
    assert np.allclose(read.volume.data[0].numpy(), nib.load(path).get_fdata(), atol=1e-4)


def test_scaled_integers_survive_a_round_trip(tmp_path):
    """uint8 with slope and intercept is read scaled, and written with the same type and scaling."""
    image = nifti(np.arange(64, dtype=np.uint8).reshape(4, 4, 4))
    image.header.set_slope_inter(0.5, -3)
    image.header.set_xyzt_units("mm")
    image.set_sform(np.diag([2, 2, 2, 1]), code=4)
    nib.save(image, tmp_path / "in.nii.gz")
    read = read_image(tmp_path / "in.nii.gz")
    assert read.storage == Storage(np.dtype(np.uint8), 0.5, -3.0)
    assert float(read.volume.data.max()) == 63 * 0.5 - 3
    write_image(tmp_path / "out.nii.gz", read.volume, read, read.storage)
    again = nib.load(tmp_path / "out.nii.gz")
    assert again.get_data_dtype() == np.uint8
    assert int(again.header["sform_code"]) == 4
    assert again.header.get_xyzt_units()[0] == "mm"
    assert np.array_equal(again.get_fdata(), nib.load(tmp_path / "in.nii.gz").get_fdata())


def test_values_are_rounded_and_clipped_to_the_storage(tmp_path):
    grid = Grid((3, 2, 2), np.eye(4))
    read = read_image(nifti(np.arange(12, dtype=np.uint8).reshape(3, 2, 2)))
    volume = Volume(torch.tensor([-5.0, 0.4, 0.6, 254.7, 300, 7] * 2).reshape(1, 3, 2, 2), grid)
    write_image(tmp_path / "out.nii.gz", volume, read, read.storage)
    stored = np.asarray(nib.load(tmp_path / "out.nii.gz").dataobj).ravel()[:6]
    assert stored.tolist() == [0, 0, 1, 255, 255, 7]


def test_nibabel_torchio_and_trailing_dimensions(tmp_path):
    array = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    affine = oriented_grid("oblique", (1.0, 2.0, 3.0)).affine.numpy()
    for source in (
        nifti(array, affine),
        nifti(array[..., None], affine),
        tio.ScalarImage(tensor=array[None], affine=affine),
    ):
        read = read_image(source)
        assert np.allclose(read.volume.data[0].numpy(), array)
        assert np.allclose(read.volume.grid.affine.numpy(), affine, atol=1e-5)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_other_formats_have_the_geometry_of_nifti(oriented, save_volume, tmp_path, suffix):
    path = save_volume(blobs(oriented))
    other = tmp_path / f"image{suffix}"
    sitk.WriteImage(sitk.ReadImage(str(path)), str(other))
    a, b = read_image(path), read_image(other)
    assert torch.allclose(a.volume.grid.affine, b.volume.grid.affine, atol=1e-3)
    assert torch.equal(a.volume.data, b.volume.data)


def test_mgh_is_read(tmp_path):
    array = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    nib.save(nib.MGHImage(array, np.diag([2.0, 2, 2, 1])), tmp_path / "image.mgz")
    assert read_image(tmp_path / "image.mgz").volume.grid.spacing == pytest.approx((2, 2, 2))


def test_labels_and_masks(tmp_path):
    array = np.zeros((4, 4, 4), np.float32)
    array[1:3] = 507
    labels = read_image(nifti(array), "labels")
    assert labels.volume.data.dtype == torch.int32
    assert labels.volume.data.unique().tolist() == [0, 507]
    assert read_image(nifti(array), "mask").volume.data.unique().tolist() == [0, 1]


def bad_files(folder):
    """Every kind of bad input: path, how it is read, and what the message must say."""
    rng = np.random.default_rng(0)
    good = rng.random((6, 6, 6)).astype(np.float32)

    def save(name, image):
        nib.save(image, folder / name)
        return folder / name

    with_nan, with_inf = good.copy(), good.copy()
    with_nan[1, 2, 3], with_inf[0] = np.nan, np.inf
    (folder / "text.nii.gz").write_text("this is not an image")
    (folder / "empty.nii").write_bytes(b"")
    (folder / "folder.nii").mkdir()
    whole = gzip.compress(nifti(rng.random((40, 40, 40)).astype(np.float32)).to_bytes())
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    flat = nifti(good, np.diag([1.0, 1, 1, 1]))
    flat.header["sform_code"], flat.header["srow_z"] = 1, [0, 0, 0, 0]
    flat_bytes = bytearray(flat.to_bytes())
    header = nib.Nifti1Header(bytes(flat_bytes[:348]))
    header["sform_code"], header["qform_code"], header["srow_z"] = 1, 0, [0, 0, 0, 0]
    flat_bytes[:348] = header.binaryblock
    (folder / "flat.nii").write_bytes(bytes(flat_bytes))
    rgb = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    return {
        "missing": (folder / "missing.nii.gz", "image", "no such file"),
        "folder": (folder / "folder.nii", "image", "is a folder"),
        "text": (folder / "text.nii.gz", "image", "not a readable image"),
        "empty": (folder / "empty.nii", "image", "not a readable image"),
        "cut short": (folder / "cut.nii.gz", "image", "cut short or damaged"),
        "2-D": (save("2d.nii.gz", nifti(good[0])), "image", "give a 3-D image"),
        "one slice": (save("slice.nii.gz", nifti(good[:, :, :1])), "image", "a single slice"),
        "4-D": (save("4d.nii.gz", nifti(rng.random((4, 4, 4, 3)))), "image", "3 volumes; give one of them"),
        "colours": (save("rgb.nii.gz", nifti(rgb)), "image", "not real numbers"),
        "complex": (save("complex.nii.gz", nifti(good.astype(np.complex64))), "image", "not real numbers"),
        "NaN": (save("nan.nii.gz", nifti(with_nan)), "image", "1 of 216 voxels are NaN"),
        "infinite": (save("inf.nii.gz", nifti(with_inf)), "image", "36 of 216 voxels are NaN or infinite"),
        "constant": (save("constant.nii.gz", nifti(np.full((4, 4, 4), 7.0))), "image", "every voxel is 7"),
        "empty mask": (save("mask.nii.gz", nifti(np.zeros((4, 4, 4)))), "mask", "the mask is empty"),
        "fractions": (save("fractions.nii.gz", nifti(good)), "labels", "whole numbers"),
        "flat affine": (folder / "flat.nii", "image", "singular"),
    }  # fmt: skip


KINDS = [
    "missing", "folder", "text", "empty", "cut short", "2-D", "one slice", "4-D", "colours", "complex", "NaN", "infinite",
    "constant", "empty mask", "fractions", "flat affine",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bad_files_are_named_with_the_remedy(kind, tmp_path):
    path, read_as, says = bad_files(tmp_path)[kind]
    with pytest.raises((InputError, GeometryError), match=says) as caught:
        read_image(path, read_as)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_something_else_is_refused():
    with pytest.raises(InputError, match="expected a path"):
        read_image(np.zeros((4, 4, 4)))


def test_no_orientation_is_warned_about(caplog, tmp_path):
    image = nifti(np.random.default_rng(0).random((4, 4, 4)), np.diag([2.0, 2, 2, 1]))
    image.header["qform_code"] = image.header["sform_code"] = 0
    image.header["pixdim"][1:4] = 2
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), tmp_path / "image.nii.gz")
    with caplog.at_level(logging.WARNING):
        read = read_image(tmp_path / "image.nii.gz")
    assert "has no orientation" in caplog.text
    assert read.volume.grid.spacing == pytest.approx((2, 2, 2))


def test_disagreeing_forms_are_warned_about(caplog, tmp_path):
    image = nifti(np.random.default_rng(0).random((4, 4, 4)))
    image.header.set_sform(np.diag([2.0, 2, 2, 1]), code=1)
    image.header.set_qform(np.diag([3.0, 3, 3, 1]), code=1)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), tmp_path / "image.nii.gz")
    with caplog.at_level(logging.WARNING):
        read_image(tmp_path / "image.nii.gz")
    assert "qform and sform differ" in caplog.text


def test_images_are_written_as_nifti(tmp_path):
    read = read_image(nifti(np.random.default_rng(0).random((4, 4, 4))))
    with pytest.raises(InputError, match=r"end the name in \.nii"):
        write_image(tmp_path / "out.png", read.volume, read)


def test_scaled_floats_keep_their_values(tmp_path):
    """SPM and some PET scanners write float voxels with a slope: the copy holds the values themselves."""
    values = np.random.default_rng(0).normal(5, 2, (6, 7, 8)).astype(np.float32)
    image = nib.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(2.0, 10.0)
    nib.save(image, tmp_path / "a.nii")
    read = read_image(tmp_path / "a.nii")
    assert np.allclose(read.volume.data[0], nib.load(tmp_path / "a.nii").get_fdata(), rtol=1e-5)
    write_image(tmp_path / "b.nii", read.volume, read, read.storage)
    again = nib.load(tmp_path / "b.nii")
    assert np.allclose(again.get_fdata(), read.volume.data[0], rtol=1e-5)
    assert again.get_data_dtype() == np.float32


def test_damaged_compression_is_named(tmp_path):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 20, 20)), np.eye(4)), tmp_path / "a.nii.gz")
    stored = bytearray((tmp_path / "a.nii.gz").read_bytes())
    for place in (15, 30, 200, len(stored) // 2):
        damaged = stored.copy()
        damaged[place : place + 8] = b"\xff" * 8
        (tmp_path / "bad.nii.gz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"bad\.nii\.gz"):
            read_image(tmp_path / "bad.nii.gz")


def test_a_grid_needs_no_usable_voxels(tmp_path):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    nib.save(nib.Nifti1Image(np.full((4, 5, 6, 3), np.nan), affine), tmp_path / "a.nii")
    grid, header = read_grid(tmp_path / "a.nii")
    assert grid.shape == (4, 5, 6)
    assert np.allclose(grid.affine, affine)
    assert header["sform_code"] > 0
    with pytest.raises(InputError, match="no such file"):
        read_grid(tmp_path / "b.nii")
