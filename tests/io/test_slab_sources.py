"""Planes of a file are the planes of the image that is read as a whole."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import textwrap

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import blobs, known_transform, oriented_grid

from patchreg.errors import GeometryError, InputError
from patchreg.inference.registration import displacement_on
from patchreg.io import (
    SlabContents,
    Storage,
    boxes,
    open_slabs,
    read_image,
    read_transform,
    staged_slabs,
    write_vectors,
)

RNG = np.random.default_rng(0)


def oblique():
    return oriented_grid("oblique", (4.0, 5.0, 6.0))


def save(path, array, **scaling):
    image = nib.Nifti1Image(array, oblique().affine.numpy(), dtype=array.dtype)
    if scaling:
        image.header.set_slope_inter(**scaling)
    nib.save(image, path)
    return path


@pytest.fixture(params=[boxes.AT_ONCE, 700], ids=["at once", "in parts"])
def voxels_at_once(request, monkeypatch):
    """However many voxels are converted at a time."""
    monkeypatch.setattr(boxes, "AT_ONCE", request.param)


FILES = {
    "float32": (lambda s: RNG.normal(size=s).astype(np.float32), {}, "image"),
    "float64": (lambda s: RNG.normal(size=s), {}, "image"),
    "big endian": (lambda s: RNG.normal(size=s).astype(">f4"), {}, "image"),
    "int16 scaled": (lambda s: RNG.integers(-999, 999, s).astype(np.int16), {"slope": 0.37, "inter": -3.1}, "image"),
    "float32 scaled": (lambda s: RNG.normal(size=s).astype(np.float32), {"slope": 2.0, "inter": 10.0}, "image"),
    "uint8 labels": (lambda s: RNG.integers(0, 9, s).astype(np.uint8), {}, "labels"),
    "float labels": (lambda s: RNG.integers(0, 9, s).astype(np.float32), {}, "labels"),
    "mask": (lambda s: RNG.integers(0, 2, s).astype(np.uint8), {}, "mask"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("stored", FILES)
def test_planes_equal_the_whole_image(tmp_path, stored, suffix, voxels_at_once):
    make, scaling, kind = FILES[stored]
    path = save(tmp_path / f"a{suffix}", make((9, 11, 14)), **scaling)
    whole = read_image(path, kind)
    with open_slabs(path, kind) as source:
        assert source.grid == whole.volume.grid
        assert source.channels == 1
        assert source.dtype == whole.volume.data.dtype
        assert source.storage == whole.storage
        assert source.header == whole.header
        for dim, n in enumerate(source.grid.shape):
            for start, stop in ((0, n), (2, 5), (n - 1, n), (0, 1), (3, 3)):
                slab = source.read(start, stop, dim)
                assert slab.dtype == whole.volume.data.dtype
                assert torch.equal(slab, whole.volume.data.narrow(1 + dim, start, stop - start))


def test_mgh_is_read_by_planes(tmp_path):
    array = RNG.normal(size=(5, 6, 7)).astype(np.float32)
    for name in ("a.mgh", "a.mgz"):
        nib.save(nib.MGHImage(array, np.diag([2.0, 2, 2, 1])), tmp_path / name)
        with open_slabs(tmp_path / name) as source:
            assert torch.equal(source.read(1, 4, 1), read_image(tmp_path / name).volume.data[:, :, 1:4])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_volumes_are_channels(tmp_path, suffix, voxels_at_once):
    array = RNG.integers(0, 99, (5, 6, 7, 3)).astype(np.int16)
    path = save(tmp_path / f"a{suffix}", array, slope=0.5, inter=1.0)
    expected = torch.from_numpy(nib.load(path).get_fdata(dtype=np.float32)).permute(3, 0, 1, 2)
    with open_slabs(path) as source:
        assert source.channels == 3
        for dim in range(3):
            assert torch.equal(source.read(1, 4, dim), expected.narrow(1 + dim, 1, 3))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_displacements_are_those_of_the_transform(tmp_path, suffix):
    fixed = blobs(oblique())
    path = tmp_path / f"d{suffix}"
    write_vectors(path, displacement_on(known_transform(), fixed.grid), fixed.grid, nib.Nifti1Header())
    expected = read_transform(path).transforms[0]
    with open_slabs(path, "displacement") as source:
        assert source.grid == expected.grid
        for dim in range(3):
            assert torch.equal(source.read(2, 7, dim), expected.displacement_mm[0].narrow(1 + dim, 2, 5))


def test_a_forked_process_reads_on_its_own(tmp_path):
    """The position in an open file is shared by a process and its children."""
    path = save(tmp_path / "a.nii.gz", RNG.normal(size=(20, 20, 40)).astype(np.float32))
    whole = read_image(path).volume.data
    with open_slabs(path) as source:
        source.read(0, 2, 2)
        child = os.fork()
        if child == 0:
            ok = all(torch.equal(source.read(k, k + 1, 2), whole[..., k : k + 1]) for k in range(39, 1, -1))
            os._exit(0 if ok else 1)
        for k in range(2, 40):
            assert torch.equal(source.read(k, k + 1, 2), whole[..., k : k + 1])
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs Linux's count of the bytes that a process reads")
@pytest.mark.parametrize(("dim", "whole_file"), [(0, True), (1, False), (2, False)])
def test_a_slab_of_a_large_file_takes_the_memory_of_a_slab(tmp_path, dim, whole_file):
    """Of 1 GiB, 8 planes: the peak of a process, and the bytes that it reads."""
    script = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import nibabel, numpy, torch
        from patchreg.io import open_slabs
        from patchreg.io.nifti import Storage, header_bytes
        from patchreg.spatial import Grid

        path, dim, shape = Path(sys.argv[1]), int(sys.argv[2]), (512, 512, 1024)
        header = header_bytes(1, Storage(numpy.dtype(numpy.float32)), Grid(shape, numpy.eye(4)), None)
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(len(header) + 4 * 2**28)

        def read_bytes():
            return int(Path("/proc/self/io").read_text().split()[1])

        with open_slabs(path) as source:
            torch.ones(10).sum()
            peak, taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, read_bytes()
            slab = source.read(100, 108, dim)
            assert slab.shape[1 + dim] == 8 and not slab.any()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        print(slab.numel() * 4, peak * 1024, read_bytes() - taken)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "large.nii"), str(dim)],
        capture_output=True,
        text=True,
        check=True,
    )
    slab, peak, taken = map(int, done.stdout.split())
    assert peak < slab + 200 * 2**20
    assert taken < (2**30 if whole_file else slab) + 2**20


def bad_sources(folder):
    """Every kind of bad input: path, how it is read, and what the message must say."""
    good = RNG.normal(size=(6, 7, 8)).astype(np.float32)
    with_nan = good.copy()
    with_nan[1, 2, 3] = np.nan
    whole = nib.Nifti1Image(RNG.normal(size=(40, 40, 40)).astype(np.float32), np.eye(4)).to_bytes()
    (folder / "text.nii").write_text("this is not an image")
    (folder / "cut.nii").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.nii.gz").write_bytes(gzip.compress(whole)[: len(whole) // 2])
    (folder / "folder.nii").mkdir()
    (folder / "a.nrrd").write_text("")
    rgb = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    return {
        "missing": (folder / "missing.nii", "image", "no such file"),
        "folder": (folder / "folder.nii", "image", "is a folder"),
        "text": (folder / "text.nii", "image", "not a readable image"),
        "nrrd": (folder / "a.nrrd", "image", "convert it to .nii or .ome.zarr"),
        "cut short": (folder / "cut.nii", "image", "cut short or damaged"),
        "cut short, compressed": (folder / "cut.nii.gz", "image", "cut short or damaged"),
        "2-D": (save(folder / "2d.nii", good[0]), "image", "give a 3-D image"),
        "one slice": (save(folder / "slice.nii", good[:, :, :1]), "image", "a single slice"),
        "colours": (save(folder / "rgb.nii", rgb), "image", "not real numbers"),
        "NaN": (save(folder / "nan.nii", with_nan), "image", r"1 of 336 voxels in \[0:6, 0:7, 0:8\] are NaN"),
        "fractions": (save(folder / "fractions.nii", good), "labels", "whole numbers"),
        "vectors as an image": (save(folder / "5d.nii", RNG.normal(size=(4, 4, 4, 1, 3))), "image", "give a 3-D image"),
        "an image as vectors": (save(folder / "3d.nii", good), "displacement", "not an ITK displacement field"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["missing", "folder", "text", "nrrd", "cut short", "cut short, compressed", "2-D", "one slice", "colours", "NaN",
     "fractions", "vectors as an image", "an image as vectors"],
)  # fmt: skip
def test_bad_files_are_named_with_the_remedy(kind, tmp_path):
    path, read_as, says = bad_sources(tmp_path)[kind]
    with pytest.raises((InputError, GeometryError), match=says) as caught, open_slabs(path, read_as) as source:
        source.read(0, source.grid.shape[2], 2)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_planes_that_are_not_there(tmp_path):
    path = save(tmp_path / "a.nii", RNG.normal(size=(5, 6, 7)))
    with pytest.raises(InputError, match="levels other than 0 are OME-Zarr's"):
        open_slabs(path, level=1)
    with open_slabs(path) as source:
        with pytest.raises(InputError, match="has planes 0 to 6 along dim 1, not 4 to 7"):
            source.read(4, 7, 1)
        with pytest.raises(InputError, match="not -1 to 2"):
            source.read(-1, 2)
        with pytest.raises(InputError, match="dim 0, 1 or 2"):
            source.read(0, 2, 3)


def test_a_slab_may_be_constant_or_empty(tmp_path):
    """The margin of an image is; only the whole image must not be."""
    array = np.zeros((6, 6, 6), np.uint8)
    array[3:] = 1
    path = save(tmp_path / "a.nii", array)
    for kind in ("image", "mask", "labels"):
        with open_slabs(path, kind) as source:
            assert not source.read(0, 3).any()


def test_zarr_planes_equal_the_whole_image(tmp_path, voxels_at_once):
    grid = oriented_grid("LIA", (4.0, 5.0, 6.0))
    data = torch.from_numpy(RNG.integers(0, 999, (1, *grid.shape)).astype(np.int32))
    with staged_slabs(
        tmp_path / "a.ome.zarr", SlabContents(grid, storage=Storage(np.dtype(np.int16))), 0, [0, 8]
    ) as sink:
        sink.write(0, data)
    for kind in ("image", "labels", "mask"):
        whole = read_image(tmp_path / "a.ome.zarr", kind)
        with open_slabs(tmp_path / "a.ome.zarr", kind) as source:
            assert source.grid == whole.volume.grid
            assert source.storage == whole.storage
            for dim in range(3):
                assert torch.equal(source.read(3, 11, dim), whole.volume.data.narrow(1 + dim, 3, 8))
