"""What several processes write by slabs is what one writes as a whole, or nothing."""

from __future__ import annotations

import multiprocessing
import pickle
import resource
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import known_transform, oriented_grid

from patchreg.distributed.partition import Partition
from patchreg.errors import InputError, OutputError
from patchreg.inference.registration import displacement_on
from patchreg.io import (
    SlabContents,
    Storage,
    boxes,
    nifti,
    open_slabs,
    read_image,
    read_transform,
    staged_slabs,
    write_vectors,
)
from patchreg.spatial import Grid

SHAPE = (21, 26, 35)
SUFFIXES = [".nii", ".nii.gz", ".ome.zarr"]
WRITABLE = [(".nii", 0), (".nii", 1), (".nii", 2), (".nii.gz", 2), (".ome.zarr", 0), (".ome.zarr", 1), (".ome.zarr", 2)]


def grid_of(orientation="oblique", shape=SHAPE):
    return Grid(shape, oriented_grid(orientation, (4.0, 5.0, 6.0)).affine)


def values(channels=1, seed=0, shape=SHAPE):
    return torch.randn((channels, *shape), generator=torch.Generator().manual_seed(seed)) * 50


def listing(folder):
    return sorted(p.name for p in folder.iterdir())


def write_all(sink, data, partition):
    for start, stop in reversed(partition.spans):
        sink.write(start, data.narrow(sink.dim + 1, start, stop - start))


def cut(dim, ranks=3, multiple=1):
    return Partition.even(SHAPE[dim], ranks, multiple=multiple)


@pytest.fixture(params=[boxes.AT_ONCE, 700], ids=["at once", "in parts"])
def voxels_at_once(request, monkeypatch):
    monkeypatch.setattr(boxes, "AT_ONCE", request.param)


@pytest.mark.parametrize(("suffix", "dim"), WRITABLE)
@pytest.mark.parametrize("channels", [1, 3])
def test_slabs_make_the_image(tmp_path, suffix, dim, channels, voxels_at_once):
    path, data = tmp_path / f"a{suffix}", values(channels)
    with staged_slabs(path, SlabContents(grid_of(), channels), dim, cut(dim).starts) as sink:
        assert not path.exists()
        write_all(sink, data, cut(dim))
    assert listing(tmp_path) == [path.name]
    with open_slabs(path) as source:
        assert torch.allclose(source.grid.affine, grid_of().affine, atol=1e-4)
        assert torch.equal(source.read(0, SHAPE[0]), data)


@pytest.fixture(scope="module")
def processes():
    """Three, each with a queue of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        yield [stack.enter_context(ProcessPoolExecutor(1, spawn)) for _ in range(3)]


@pytest.mark.parametrize(("suffix", "dim"), WRITABLE)
def test_processes_fill_one_file(tmp_path, suffix, dim, processes):
    """Uneven slabs, the boundaries in the middle of pages and of nothing else."""
    path, data, partition = tmp_path / f"a{suffix}", values(), cut(dim, multiple=4)
    assert len(set(partition.sizes)) > 1
    with staged_slabs(path, SlabContents(grid_of()), dim, partition.starts) as sink:
        assert len(pickle.dumps(sink)) < 2000
        writing = [
            process.submit(sink.write, start, data.narrow(1 + dim, start, stop - start).contiguous())
            for process, (start, stop) in zip(processes, partition.spans, strict=True)
        ]
        for written in writing:
            written.result()
    assert torch.equal(read_image(path).volume.data, data)


@pytest.mark.parametrize(
    "storage", [Storage(np.dtype(np.float32)), Storage(np.dtype(np.int16), 0.37, -3.0), Storage(np.dtype(np.uint8))]
)
@pytest.mark.parametrize("orientation", ["RAS", "LPS", "oblique"])
def test_nifti_is_the_file_that_is_written_as_a_whole(tmp_path, storage, orientation):
    """Byte for byte: header, rounding and clipping."""
    like = nib.Nifti1Header()
    like.set_xyzt_units("mm", "sec")
    like["sform_code"] = 4
    data, grid = values(), grid_of(orientation)
    nifti.write(tmp_path / "whole.nii", data[0], grid, like, storage)
    for dim in range(3):
        with staged_slabs(tmp_path / "slabs.nii", SlabContents(grid, 1, storage, like), dim) as sink:
            write_all(sink, data, cut(dim))
        assert (tmp_path / "slabs.nii").read_bytes() == (tmp_path / "whole.nii").read_bytes()


@pytest.mark.parametrize(("suffix", "dim"), [(".nii", 0), (".nii", 1), (".nii", 2), (".nii.gz", 2)])
def test_displacements_are_those_that_are_written_as_a_whole(tmp_path, suffix, dim):
    grid, like = grid_of(), nib.Nifti1Header()
    like.set_xyzt_units("mm")
    u = displacement_on(known_transform(), grid)
    write_vectors(tmp_path / f"whole{suffix}", u, grid, like)
    path = tmp_path / f"slabs{suffix}"
    with staged_slabs(path, SlabContents(grid, 3, like=like, displacement=True), dim) as sink:
        write_all(sink, u[0], cut(dim))
    assert nib.load(path).header == nib.load(tmp_path / f"whole{suffix}").header
    ours, theirs = (read_transform(p).transforms[0] for p in (path, tmp_path / f"whole{suffix}"))
    assert ours.grid == theirs.grid
    assert torch.equal(ours.displacement_mm, theirs.displacement_mm)
    itk = sitk.ReadImage(str(path), sitk.sitkVectorFloat32)
    lps = torch.from_numpy(sitk.GetArrayFromImage(itk).transpose(3, 2, 1, 0).copy())
    assert torch.equal(lps * torch.tensor([-1.0, -1, 1]).reshape(3, 1, 1, 1), u[0])


def test_itk_reads_what_was_compressed_in_pieces(tmp_path):
    data = values()
    with staged_slabs(tmp_path / "a.nii.gz", SlabContents(grid_of()), 2) as sink:
        write_all(sink, data, cut(2, 5))
    read = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz"))).transpose(2, 1, 0)
    assert np.array_equal(read, data[0].numpy())


def test_a_slab_of_any_type_and_device_layout(tmp_path):
    data = torch.arange(np.prod(SHAPE)).reshape(SHAPE)[None] % 200
    for given in (data, data.to(torch.bfloat16), data.double().requires_grad_(), data.to(torch.uint8)):
        with staged_slabs(tmp_path / "a.nii", SlabContents(grid_of(), 1, Storage(np.dtype(np.uint8))), 1) as sink:
            sink.write(0, given[:, :, :20].permute(0, 3, 1, 2).permute(0, 2, 3, 1))
            sink.write(20, given[:, :, 20:20])
            sink.write(20, given[:, :, 20:])
        assert torch.equal(read_image(tmp_path / "a.nii", "labels").volume.data, data)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("error", [InputError("bad input"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_failure(tmp_path, suffix, error):
    with (
        pytest.raises(type(error)),
        staged_slabs(tmp_path / "below" / f"a{suffix}", SlabContents(grid_of()), 2) as sink,
    ):
        sink.write(0, values())
        raise error
    assert listing(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_replaced_whole_or_stays(tmp_path, suffix):
    path, old, new = tmp_path / f"a{suffix}", values(seed=1), values(seed=2)
    with staged_slabs(path, SlabContents(grid_of()), 2) as sink:
        sink.write(0, old)
    with pytest.raises(InputError, match="stop"), staged_slabs(path, SlabContents(grid_of()), 2) as sink:
        sink.write(0, new)
        raise InputError("stop")
    assert torch.equal(read_image(path).volume.data, old)
    with staged_slabs(path, SlabContents(grid_of()), 2) as sink:
        sink.write(0, new)
    assert torch.equal(read_image(path).volume.data, new)
    assert listing(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_planes_that_are_missing_or_twice_there(tmp_path, suffix):
    contents, data = SlabContents(grid_of()), values()
    for written, says in (
        ([(0, 8), (24, 35)], "planes 8 to 24 along dim 2 were never written"),
        ([(8, 35)], "planes 0 to 8 along dim 2 were never"),
        ([], "planes 0 to 35 along dim 2 were never"),
        ([(0, 16), (8, 35)], "planes 8 to 16 along dim 2 were written twice"),
    ):
        with (
            pytest.raises(OutputError, match=says) as caught,
            staged_slabs(tmp_path / f"a{suffix}", contents, 2, [0, 8]) as sink,
        ):
            for start, stop in written:
                sink.write(start, data[..., start:stop])
        assert str(tmp_path / f"a{suffix}") in str(caught.value)
        assert listing(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_whoever_comes_late_is_told_and_leaves_nothing(tmp_path, suffix):
    with pytest.raises(InputError), staged_slabs(tmp_path / f"a{suffix}", SlabContents(grid_of()), 2) as sink:
        late = pickle.loads(pickle.dumps(sink))
        raise InputError("stop")
    with pytest.raises(OutputError, match="was given up by the process that began it"):
        late.write(0, values())
    assert listing(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_real_limit_on_file_size_leaves_nothing(tmp_path, suffix):
    """The operating system refuses, as a full disk does: for .nii at once, for what is compressed on the way."""
    script = textwrap.dedent(
        """
        import sys
        import numpy as np, torch
        from patchreg.errors import OutputError
        from patchreg.io import SlabContents, staged_slabs
        from patchreg.spatial import Grid

        try:
            with staged_slabs(sys.argv[1], SlabContents(Grid((64, 64, 64), np.eye(4))), 2) as sink:
                print("began")
                sink.write(0, torch.randn(1, 64, 64, 64))
        except OutputError as error:
            print(error)
            sys.exit(2)
        """
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / f"a{suffix}")],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stdout
    assert f"a{suffix}: " in done.stdout
    assert ("began" in done.stdout) == (suffix != ".nii")
    assert listing(tmp_path) == []


def test_zarr_chunks_belong_to_one_slab(tmp_path):
    contents, data = SlabContents(grid_of(shape=(100, 20, 20))), values(shape=(100, 20, 20))
    for starts, multiple in (((0, 48, 80), 16), ((0, 64), 64), ((0, 33, 67), 1), ((), 64)):
        with staged_slabs(tmp_path / "a.zarr", contents, 0, starts) as sink:
            assert sink.multiple == multiple
            sink.write(0, data)
    with (
        pytest.raises(InputError, match="64 planes along dim 0.*planes 0 to 50 cut through") as caught,
        staged_slabs(tmp_path / "b.zarr", contents, 0) as sink,
    ):
        sink.write(0, data[:, :50])
    assert "b.zarr" in str(caught.value)


def test_ranks_without_planes_do_not_spoil_the_chunks(tmp_path):
    partition = Partition((8, 8, 5, 0, 0))
    with staged_slabs(tmp_path / "a.zarr", SlabContents(grid_of()), 0, partition.starts) as sink:
        assert sink.multiple == 8
        write_all(sink, values(), partition)
    assert torch.equal(read_image(tmp_path / "a.zarr").volume.data, values())


def test_writing_into_a_large_file_takes_the_memory_of_a_slab(tmp_path):
    """Planes along I lie all over the file: 8 of them of 512 MiB."""
    script = textwrap.dedent(
        """
        import resource, sys
        import numpy, torch
        from patchreg.io import SlabContents, nifti, staged_slabs
        from patchreg.spatial import Grid

        shape = (256, 512, 1024)
        contents = SlabContents(Grid(shape, numpy.eye(4)))
        try:
            with staged_slabs(sys.argv[1], contents) as sink:
                slab = torch.ones(1, 8, 512, 1024)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                sink.write(16, slab)
                print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024)
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.nii")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150 * 2**20
    assert listing(tmp_path) == []


def test_what_cannot_be_written_is_named(tmp_path):
    grid = grid_of()
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.zarr" / "mine.txt").write_text("mine")
    scaled = Storage(np.dtype(np.int16), 2.0)
    for name, contents, dim, says in (
        ("a.nrrd", SlabContents(grid), 0, "end the name in .nii, .nii.gz or .ome.zarr"),
        ("a.nii.gz", SlabContents(grid), 0, "only be written by slabs along the last dimension, not along dim 0; write .nii"),
        ("a.nii", SlabContents(grid), 3, "dim 0, 1 or 2"),
        ("a.nii", SlabContents(Grid((40_000, 2, 2), grid.affine)), 0, "NIfTI cannot hold this image.*write .ome.zarr"),
        ("a.zarr", SlabContents(grid, 3, displacement=True), 0, "no displacement fields"),
        ("a.zarr", SlabContents(grid, storage=scaled), 0, "no slope and intercept"),
        ("folder.zarr", SlabContents(grid), 0, "is a folder of other files"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says) as caught, staged_slabs(tmp_path / name, contents, dim):
            pass
        assert name in str(caught.value) or "NIfTI cannot" in str(caught.value)
    assert listing(tmp_path) == ["folder.zarr"]
    for wrong in (
        {"channels": 0},
        {"channels": 2, "displacement": True},
        {"channels": 3, "storage": scaled, "displacement": True},
    ):
        with pytest.raises(InputError, match="channel"):
            SlabContents(grid, **wrong)


def test_slabs_that_do_not_fit(tmp_path):
    for start, shape, says in (
        (0, (1, 5, 26, 34), r"has shape \(1, planes, 26, 35\), got \(1, 5, 26, 34\)"),
        (0, (2, 5, 26, 35), r"got \(2, 5, 26, 35\)"),
        (0, (5, 26, 35), r"got \(5, 26, 35\)"),
        (20, (1, 5, 26, 35), "has planes 0 to 21 along dim 0, not 20 to 25"),
        (-1, (1, 5, 26, 35), "not -1 to 4"),
    ):
        with pytest.raises(InputError, match=says), staged_slabs(tmp_path / "a.nii", SlabContents(grid_of())) as sink:
            sink.write(start, torch.zeros(shape))
