"""OME-Zarr files as other software makes them: where their voxels lie, and what is refused."""

from __future__ import annotations

import json
import logging
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
import zarr

from patchreg.errors import InputError
from patchreg.inference.apply import apply_to_file
from patchreg.io import SlabContents, open_slabs, read_grid, read_image, staged_slabs, write_transform
from patchreg.spatial import Affine, Grid

RNG = np.random.default_rng(0)
DATA = RNG.integers(0, 1000, (7, 6, 5)).astype(np.uint16)  # z, y, x


def axis(name, unit="micrometer", orientation=None):
    kind = {"t": "time", "c": "channel"}.get(name, "space")
    found = {"name": name, "type": kind}
    if kind == "space" and unit:
        found["unit"] = unit
    if orientation:
        found["orientation"] = {"type": "anatomical", "value": orientation}
    return found


def steps(scale, translation=None):
    found = [{"type": "scale", "scale": scale}]
    return found + ([{"type": "translation", "translation": translation}] if translation else [])


def make(path, data=DATA, axes=None, levels=None, version="0.5", after=None, **attributes):
    """An image as the specification says it, written with zarr alone."""
    image = {
        "name": "a",
        "axes": [axis(n) for n in "zyx"] if axes is None else axes,
        "datasets": [
            {"path": f"s{n}", "coordinateTransformations": level}
            for n, level in enumerate(levels or [steps([2.0, 3, 4])])
        ],
    }
    if after:
        image["coordinateTransformations"] = after
    new = version != "0.4"
    described = (
        {"ome": {"version": version, "multiscales": [image]}}
        if new
        else {"multiscales": [image | {"version": version}]}
    )
    group = zarr.open_group(path, mode="w", zarr_format=3 if new else 2, attributes=described | attributes)
    for n, level in enumerate(image["datasets"]):
        step = (slice(None, None, 2**n),) * 3
        thinned = data[(..., *step)]
        group.create_array(level["path"], data=np.ascontiguousarray(thinned), chunks=(*(1,) * (data.ndim - 3), 4, 4, 4))
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_x_is_right_y_anterior_z_superior_in_millimetres(tmp_path, version):
    path = make(tmp_path / "a.ome.zarr", levels=[steps([2.0, 3.0, 4.0], [10.0, 20.0, 30.0])], version=version)
    read = read_image(path)
    assert read.volume.grid.shape == (5, 6, 7)
    expected = np.array([[4, 0, 0, 30], [0, 3, 0, 20], [0, 0, 2, 10], [0, 0, 0, 1000]]) * 1e-3
    assert np.allclose(read.volume.grid.affine, expected, rtol=0, atol=1e-15)
    assert np.array_equal(read.volume.data[0].numpy(), DATA.transpose(2, 1, 0))
    assert read.storage.dtype == np.uint16
    grid, header = read_grid(path)
    assert grid == read.volume.grid
    assert header.get_xyzt_units()[0] == "mm"


def test_orientation_tells_the_world_direction(tmp_path):
    """The LPS of ITK, and a file whose fastest axis runs along the body."""
    lps = [axis("z", orientation="inferior-to-superior"), axis("y", orientation="anterior-to-posterior"), axis("x", orientation="right-to-left")]  # fmt: skip
    read = read_image(make(tmp_path / "a.zarr", axes=lps, levels=[steps([2.0, 3.0, 4.0], [10.0, 20.0, 30.0])]))
    assert read.volume.grid.orientation == "LPS"
    assert np.allclose(read.volume.grid.affine[:3, 3] * 1e3, [-30, -20, 10])
    sagittal = [axis("z", orientation="left-to-right"), axis("y", orientation="superior-to-inferior"), axis("x", orientation="posterior-to-anterior")]  # fmt: skip
    assert read_image(make(tmp_path / "b.zarr", axes=sagittal)).volume.grid.orientation == "AIR"


def test_units_channels_time_and_common_transformations(tmp_path):
    axes = [axis("t"), axis("c"), axis("Z", "millimeter"), axis("Y", "nanometer"), axis("X", "centimeter")]
    data = np.stack([DATA, DATA + 1])[None]
    path = make(
        tmp_path / "a.zarr", data, axes, [steps([1, 1, 2.0, 3, 4], [0, 0, 1.0, 1, 1])], after=steps([1, 1, 10, 10, 10])
    )
    with open_slabs(path) as source:
        assert source.channels == 2
        assert np.allclose(source.grid.spacing, [400, 3e-5, 20])
        assert np.allclose(source.grid.affine[:3, 3], [100, 1e-5, 10])
        assert np.array_equal(source.read(1, 3, 2).numpy(), data[0, :, 1:3].transpose(0, 3, 2, 1))
    assert read_grid(path)[0] == source.grid
    with pytest.raises(InputError, match="2 volumes"):
        read_image(path)


def test_other_axis_orders(tmp_path):
    """The channel last, and x slowest."""
    axes = [axis("x"), axis("y"), axis("z"), axis("c")]
    data = RNG.normal(size=(8, 9, 10, 2)).astype(np.float32)
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", attributes={"ome": {"version": "0.5", "multiscales": [
        {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps([1.0, 2, 3, 1])}]}
    ]}})  # fmt: skip
    group.create_array("0", data=data)
    with open_slabs(tmp_path / "a.zarr") as source:
        assert source.grid.shape == (10, 9, 8)
        assert source.grid.orientation == "SAR"
        assert np.array_equal(source.read(2, 5, 0).numpy(), data.transpose(3, 2, 1, 0)[:, 2:5])


def test_levels_cover_the_same_place(tmp_path):
    path = make(tmp_path / "a.zarr", levels=[steps([1.0] * 3), steps([2.0] * 3, [0.5] * 3)])
    coarse = open_slabs(path, level=1)
    assert coarse.grid.shape == (3, 3, 4)
    assert np.allclose(coarse.grid.affine[:3, 3] * 1e3, 0.5)
    assert np.array_equal(coarse.read(0, 3)[0].numpy(), DATA[::2, ::2, ::2].transpose(2, 1, 0))
    with pytest.raises(InputError, match="has 2 levels, 0 to 1; got 2"):
        open_slabs(path, level=2)


def test_an_oblique_grid_comes_back_exactly(oriented, tmp_path, caplog):
    data = torch.randn(1, *oriented.shape)
    with caplog.at_level(logging.WARNING), staged_slabs(tmp_path / "a.ome.zarr", SlabContents(oriented), 2) as sink:
        sink.write(0, data)
    oblique = bool(((oriented.direction.abs() > 1e-6) & (oriented.direction.abs() < 1 - 1e-6)).any())
    assert ("cannot hold a rotation" in caplog.text) == oblique
    assert torch.equal(read_image(tmp_path / "a.ome.zarr").volume.data, data)
    assert read_grid(tmp_path / "a.ome.zarr")[0] == oriented
    # what other software sees: exact along the axes, the nearest axes otherwise
    metadata = json.loads((tmp_path / "a.ome.zarr" / "zarr.json").read_text())
    del metadata["attributes"]["patchreg"]
    (tmp_path / "a.ome.zarr" / "zarr.json").write_text(json.dumps(metadata))
    seen = read_grid(tmp_path / "a.ome.zarr")[0]
    assert seen.orientation == oriented.orientation
    assert torch.allclose(seen.affine, oriented.affine) != oblique


def test_the_noted_affine_of_a_pyramid_and_of_a_changed_file(tmp_path, caplog):
    turn = np.array([[0.8, -0.6, 0, 7], [0.6, 0.8, 0, 8], [0, 0, 1, 9], [0, 0, 0, 1]])
    first = turn @ np.diag([4e-3, 3e-3, 2e-3, 1])
    levels = [steps([2.0, 3, 4]), steps([4.0, 6, 8], [1.0, 1.5, 2.0])]
    path = make(tmp_path / "a.zarr", levels=levels, patchreg={"affine": first.tolist()})
    assert np.allclose(open_slabs(path).grid.affine, first)
    fine = Grid((5, 6, 7), first)
    coarse = open_slabs(path, level=1).grid
    assert torch.allclose(coarse.affine, fine.subsampled((2, 2, 2), (0.5, 0.5, 0.5), (3, 3, 4)).affine)
    make(path, levels=[steps([5.0, 3, 4])], patchreg={"affine": first.tolist()})
    with caplog.at_level(logging.WARNING):
        assert np.allclose(open_slabs(path).grid.affine, np.diag([4e-3, 3e-3, 5e-3, 1]))
    assert "OME-NGFF is followed" in caplog.text


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, np.float16, np.float32, np.float64, bool])
def test_types_of_voxels(tmp_path, dtype):
    data = (DATA % 100).astype(dtype)
    path = make(tmp_path / "a.zarr", data)
    assert np.array_equal(read_image(path).volume.data[0].numpy(), data.transpose(2, 1, 0).astype(np.float32))
    with open_slabs(path, "mask") as source:
        assert np.array_equal(source.read(1, 4)[0].numpy(), data.transpose(2, 1, 0)[1:4] != 0)


def test_an_image_goes_through_a_transform(tmp_path):
    path = make(tmp_path / "a.ome.zarr", levels=[steps([2000.0, 3000, 4000])])
    write_transform(tmp_path / "t.h5", Affine.identity())
    apply_to_file(tmp_path / "t.h5", path, path, tmp_path / "out.nii.gz")
    out = nib.load(tmp_path / "out.nii.gz")
    assert out.get_data_dtype() == np.uint16
    assert np.allclose(out.affine, np.diag([4, 3, 2, 1]))
    assert np.array_equal(np.asarray(out.dataobj), DATA.transpose(2, 1, 0))


def test_no_unit_is_warned_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        grid, _ = read_grid(make(tmp_path / "a.zarr", axes=[axis(n, unit=None) for n in "zyx"]))
    assert np.allclose(grid.spacing, [4e-3, 3e-3, 2e-3])
    assert "axis x has no unit; it is taken for micrometres" in caplog.text


def without(*keys):
    def change(path):
        metadata = json.loads((path / "zarr.json").read_text())
        for key in keys:
            del metadata["attributes"]["ome"][key]
        (path / "zarr.json").write_text(json.dumps(metadata))

    return change


BAD = {
    "no image": (dict, without("multiscales"), "'multiscales' is missing.*is it an OME-Zarr"),
    "a plate": (lambda: {"ome": {"plate": {}}}, None, "holds several images: give one of them"),
    "old version": (lambda: {"version": "0.3", "axes": ["z", "y", "x"]}, None, "version 0.3; versions 0.4 and 0.5"),
    "2-D": (lambda: {"data": DATA[None], "axes": [axis(n) for n in "tcyx"], "levels": [steps([1.0] * 4)]}, None, "three spatial axes"),
    "time": (lambda: {"data": DATA[None].repeat(2, 0), "axes": [axis(n) for n in "tzyx"], "levels": [steps([1.0] * 4)]}, None, "has 2 time points"),
    "names": (lambda: {"axes": [axis(n) for n in "uvw"]}, None, "do not say three world directions"),
    "half oriented": (lambda: {"axes": [axis("z", orientation="inferior-to-superior"), axis("y"), axis("x")]}, None, "do not say three"),
    "unit": (lambda: {"axes": [axis(n, "lightyear") for n in "zyx"]}, None, "is in 'lightyear'; give it one of"),
    "rotation": (lambda: {"levels": [[{"type": "affine", "affine": []}]]}, None, "type 'affine' cannot be used"),
    "short scale": (lambda: {"levels": [steps([1.0, 2.0])]}, None, "'scale' or a 'translation' of 3 numbers"),
    "zero scale": (lambda: {"levels": [steps([1.0, 2.0, 0.0])]}, None, "singular"),
    "complex": (lambda: {"data": DATA.astype(np.complex64)}, None, "not real numbers"),
    "no array": (dict, lambda path: (path / "s0" / "zarr.json").unlink(), "not a readable OME-Zarr image"),
    "no metadata": (dict, lambda path: (path / "zarr.json").unlink(), "not a readable OME-Zarr image"),
    "no json": (dict, lambda path: (path / "zarr.json").write_text("{"), "not a readable OME-Zarr image"),
    "damaged": (dict, lambda path: (path / "s0" / "c" / "0" / "0" / "0").write_bytes(b"\xff" * 40), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_named_with_the_remedy(kind, tmp_path):
    arguments, change, says = BAD[kind]
    path = make(tmp_path / "bad.zarr", **arguments())
    if change:
        change(path)
    for read in (read_image, lambda p: open_slabs(p).read(0, 2)):
        with pytest.raises(InputError, match=says) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_told_how_to_install(tmp_path, monkeypatch):
    path = make(tmp_path / "a.zarr")
    monkeypatch.setitem(sys.modules, "zarr", None)
    grid = Grid((4, 4, 4), np.eye(4))
    for action in (
        lambda: read_image(path),
        lambda: open_slabs(path),
        lambda: staged_slabs(tmp_path / "b.zarr", SlabContents(grid)).__enter__(),
    ):
        with pytest.raises(InputError, match=r"\.zarr: OME-Zarr needs a package.*pip install 'zarr>=3'"):
            action()


def test_folders_are_zarr_by_their_name_or_their_metadata(tmp_path):
    assert read_image(make(tmp_path / "image")).volume.grid.shape == (5, 6, 7)
    (tmp_path / "plain").mkdir()
    for read in (read_image, open_slabs):
        with pytest.raises(InputError, match="is a folder; give one image file"):
            read(tmp_path / "plain")


def test_shards_are_read_chunk_by_chunk(tmp_path):
    path = make(tmp_path / "a.zarr")
    data = RNG.normal(size=(16, 16, 16)).astype(np.float32)
    del zarr.open_group(path)["s0"]
    zarr.open_group(path).create_array("s0", data=data, chunks=(4, 4, 4), shards=(16, 16, 16))
    with open_slabs(path) as source:
        assert source.image.chunks == (4, 4, 4)
        assert np.array_equal(source.read(3, 9, 1)[0].numpy(), data.transpose(2, 1, 0)[:, 3:9])
