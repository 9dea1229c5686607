"""Registration by several processes that share the images: what one process finds, from files and to files."""

from __future__ import annotations

import re
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import known_transform, oriented_grid
from inference_parts import known_pair, save
from ranks.comparison import limit, random, smooth

import patchreg
from patchreg.cascade import PatchCascade, Prepared, Stage
from patchreg.cascade.prepared import Normalization
from patchreg.distributed.layout import Layout
from patchreg.distributed.partition import Partition
from patchreg.distributed.slab import Slab, split_volume
from patchreg.errors import PatchregError
from patchreg.inference.inputs import read_part
from patchreg.inference.ranks import Ranks
from patchreg.inference.refine import Refinement, contrast_agreement, refine_affine, refine_deformable, similarity
from patchreg.inference.registration import displacement_on, folding_of
from patchreg.io import SlabContents, read_image, read_transform, staged_slabs, write_vectors
from patchreg.networks import KeypointAffine, VoxelMorph
from patchreg.spatial import (
    Composite,
    DisplacementField,
    Grid,
    MappedGrid,
    Volume,
    collapse,
    invert,
    jacobian_determinant,
)

SETTINGS = Refinement(
    spacings_mm=(12.0, 8.0), iterations=(4, 4), affine_spacing_mm=12.0, affine_iterations=5, window=5, step_voxels=0.05
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A head, and the same head deformed, of other size, spacing and orientation, with labels and a mask."""
    folder = tmp_path_factory.mktemp("files")
    fixed, moving, _ = known_pair(
        oriented_grid("oblique", (5.0, 6.0, 7.0), 110.0), oriented_grid("LPS", (7.0, 5.0, 6.0), 130.0)
    )
    save(fixed, folder / "fixed.nii")
    save(moving, folder / "moving.nii.gz", np.int16)
    save(Volume((moving.data / 200).round().int(), moving.grid), folder / "labels.nii", np.int16)
    save(Volume((fixed.grid.points()[None, ..., 2] > -20).float(), fixed.grid), folder / "mask.nii", np.uint8)
    return folder


def cascade():
    """An affine stage on the whole, then deformable ones on the whole, on the image and on patches."""
    torch.manual_seed(0)
    network = {"encoder": (4, 8), "decoder": (8,), "final": ()}
    stages = [
        Stage(KeypointAffine((4, 8), (8,), 8), "affine", 16),
        Stage(VoxelMorph(**network), patch_shape=16),
        Stage(VoxelMorph(**network), spacing="image"),
        Stage(VoxelMorph(**network), "velocity", 16, spacing=5.0),
    ]
    for stage in stages[1:]:
        torch.nn.init.normal_(stage.network.flow.weight, std=0.1)
    return PatchCascade(stages)


def local(whole, grid):
    """What of a whole tensor (..., I, J, K) lies on a grid that may be a part."""
    if not isinstance(grid, Slab):
        return whole
    start, stop = grid.partition.bounds(grid.rank)
    return whole.narrow(whole.ndim - 5 + grid.partition.dim, start, stop - start)


def upsampling(group, shape, coarse, dim, dtype):
    """A smoothed coarse lattice on a grid that is a part, and its gradient."""
    grid = Grid(shape, torch.eye(4))
    part = Slab(grid, Partition.even(shape[dim - 2], dist.get_world_size(group), dim), group)
    whole, weight = random((1, 3, *coarse), 1, dtype), random((1, 3, *shape), 2, dtype, grad=False)
    expected = grid.smooth_upsampled(whole, coarse, 1.0, 2.0)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), [whole])
    held = Layout(part.partition).of(coarse[dim - 2])
    mine = whole.detach() if held is None else held.cut(whole.detach(), part.rank)
    mine = mine.clone().requires_grad_()
    assert mine.shape[2:] == part.part_of(coarse)
    found = part.smooth_upsampled(mine, coarse, 1.0, 2.0)
    assert (found - local(expected, part)).abs().max() < limit(dtype) * expected.abs().max()
    (grad,) = torch.autograd.grad((found * local(weight, part)).sum(), [mine])
    wanted = wanted if held is None else held.cut(wanted, part.rank)
    assert (grad - wanted).abs().max() < limit(dtype) * wanted.abs().max()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("shape", "coarse", "dim"),
    [((17, 9, 8), (9, 5, 4), 2), ((8, 9, 22), (4, 5, 11), 4), ((6, 9, 8), (3, 5, 4), 2), ((9, 21, 5), (5, 11, 3), 3)],
)
def test_smoothed_corrections(pool, ranks, shape, coarse, dim):
    for dtype in (torch.float64, torch.float32):
        pool.run(ranks, upsampling, shape, coarse, dim, dtype)


def pieces(group, dim):
    """Slabs of a slab lie where those of the whole do; derivatives know the neighbours' planes."""
    grid = oriented_grid("oblique", (5.0, 6.0, 7.0), 60.0)
    part = Slab(grid, Partition.even(grid.shape[dim - 2], dist.get_world_size(group), dim), group)
    points, seen = local(grid.points().movedim(-1, 0), part), torch.zeros(part.shape)
    for voxels in (1, part.voxels // 3, grid.voxels):
        seen.zero_()
        for where, piece in part.slabs(voxels):
            assert isinstance(piece, Slab)
            seen[where] += 1
            assert torch.allclose(piece.points().movedim(-1, 0), points[:, *where])
        assert bool((seen == 1).all())
    u = 3 * smooth((1, 3, *grid.shape), 4, torch.float64, grad=False)
    eye = torch.eye(4, dtype=torch.float64)
    expected = jacobian_determinant(MappedGrid(grid, eye, u))
    found = jacobian_determinant(MappedGrid(part, eye, local(u, part)))
    assert torch.allclose(found, local(expected, part), rtol=1e-12)
    number = torch.tensor([float(part.rank + 1), -float(part.rank)])
    assert part.largest(number).tolist() == [dist.get_world_size(group), 0]
    assert part.alike(number).tolist() == [1, 0]


@pytest.mark.parametrize("dim", [2, 4])
def test_pieces_and_derivatives(pool, dim):
    pool.run(3, pieces, dim)


def refinement(group, folder, name):
    """Every step of the optimisation, from a transform with a field."""
    settings = replace(SETTINGS, similarity=name)
    fixed, moving, mask = (read_image(folder / f).volume for f in ("fixed.nii", "moving.nii.gz", "mask.nii"))
    start, found = known_transform(3), []
    for share in (lambda volume: volume, lambda volume: split_volume(volume, group)):
        a, b = Prepared(share(fixed), Normalization(), mask=share(mask)), Prepared(share(moving), Normalization())
        linear = refine_affine(a, b, start, settings, False, CPU).matrix
        field = refine_deformable(a, b, start, settings, CPU).transforms[0]
        flat = collapse(known_transform(3, size_mm=60.0), a.volume.grid)
        numbers = (
            contrast_agreement(a, b, start, 12.0), similarity(a, b, start, settings, 8.0),
            *folding_of(flat, flat.transforms[0].grid),
        )  # fmt: skip
        found.append((linear, field, flat.transforms[0], torch.tensor(numbers), invert(start, b.volume.grid)))
    one, many = found
    assert (many[0] - one[0]).abs().max() < 2e-4
    for step in (1, 2):
        assert isinstance(many[step].grid, Slab)
        assert many[step].grid.whole == one[step].grid
        gap = many[step].displacement_mm - local(one[step].displacement_mm, many[step].grid)
        assert gap.abs().max() < 1e-4
    assert torch.allclose(many[3], one[3], rtol=1e-5, atol=1e-6)
    assert one[3][2] > 1  # per cent are folded
    back = many[4].displacement_mm - local(one[4].displacement_mm, split_volume(moving, group).grid)
    assert back.norm(dim=1).mean() < 0.01  # either is as good as its residual
    assert many[4].residual_max_mm < 2 * max(0.01, one[4].residual_max_mm)
    return many[4].residual_mean_mm, many[4].residual_max_mm, many[4].iterations


@pytest.mark.parametrize(("ranks", "name"), [(2, "lncc"), (3, "mi")])
def test_refinement(pool, files, ranks, name):
    of_inverse = pool.run(ranks, refinement, files, name)
    assert of_inverse.count(of_inverse[0]) == ranks


def registered(group, folder, out, shared, more):
    """Register files and write the results; what was found, whole."""
    found = patchreg.register(
        folder / "fixed.nii", folder / "moving.nii.gz", cascade(), moving_labels=folder / "labels.nii",
        refinement=SETTINGS, group=group if shared else None, **{k: folder / v for k, v in more.items()},
    )  # fmt: skip
    found.save(out)
    grid, field = found.fixed.volume.grid, found.transform.transforms[0]
    assert grid.is_part == shared
    values = {
        "field": field.grid.gathered(field.displacement_mm),
        "affine": found.affine.matrix,
        "displacement": grid.gathered(displacement_on(found.transform, grid))[0],
        "moved": grid.gathered(found.moved().data),
        "moved_labels": grid.gathered(found.moved_labels().data),
        "uncertainty": found.uncertainty.grid.gathered(found.uncertainty.data),
    }
    return values, found.summary


@pytest.mark.parametrize(("ranks", "more"), [(2, {}), (3, {"fixed_mask": "mask.nii"})])
def test_registration(pool, files, tmp_path, ranks, more):
    """From files to files, and all that lies between."""
    (expected, summary), *_ = pool.run(1, registered, files, tmp_path / "one", False, more)
    (found, other), *_ = pool.run(ranks, registered, files, tmp_path / "many", True, more)
    assert (found["field"] - expected["field"]).abs().max() < 2e-3
    assert (found["affine"] - expected["affine"]).abs().max() < 2e-4
    assert (found["moved"] - expected["moved"]).abs().mean() < 1e-4 * expected["moved"].max()
    assert (found["moved_labels"] != expected["moved_labels"]).float().mean() < 1e-3
    for name in ("similarity", "folding_percent", "log_jacobian_std"):
        assert other[name] == pytest.approx(summary[name], abs=1e-3), name
    assert (other["start"], other["refined"]) == (summary["start"], summary["refined"])
    assert other["devices"] == ranks == len(other["peak_memory_mib_by_rank"])
    folder = tmp_path / "many"
    assert {p.name for p in folder.iterdir()} == {
        "moved.nii", "moved_labels.nii", "affine.h5", "displacement.nii", "inverse_displacement.nii", "summary.json",
        "report.html", "uncertainty.nii",
    }  # fmt: skip
    for name in ("moved", "moved_labels", "uncertainty", "displacement", "inverse_displacement"):
        one, many = nib.load(tmp_path / "one" / f"{name}.nii.gz"), nib.load(folder / f"{name}.nii")
        assert many.shape == one.shape
        assert many.header["intent_code"] == one.header["intent_code"]
        assert many.get_data_dtype() == one.get_data_dtype()
        assert np.abs(many.affine - one.affine).max() < 1e-4
        gap = np.abs(many.get_fdata() - one.get_fdata())
        assert gap.mean() < {"moved": 0.05, "moved_labels": 1e-3}.get(name, 0.01), name
    ours = read_transform(folder / "displacement.nii")
    inside = torch.tensor([[0.0, 0, 0], [20, -10, 15]])
    theirs = read_transform(tmp_path / "one" / "transform.h5")
    assert (ours(inside) - theirs(inside)).norm(dim=1).max() < 0.1
    affine = read_transform(folder / "affine.h5").affine_part().matrix
    assert torch.allclose(affine, found["affine"], atol=1e-6)


def from_memory(group, folder, more):
    """Images that every rank was given, thin ones among them, and an initial field read by slabs."""
    fixed, moving = nib.load(folder / "fixed.nii"), nib.load(folder / "moving.nii.gz")
    thin = nib.Nifti1Image(np.asanyarray(fixed.dataobj)[13:16, 12:15, 10:13], fixed.affine @ shift(13, 12, 10))
    found = patchreg.register(fixed, moving, cascade(), "affine", refine=False, group=group, **more)
    assert found.fixed.volume.grid.is_part
    whole = patchreg.register(thin, thin, cascade(), "deformable", refine=False, group=group)
    assert not whole.fixed.volume.grid.is_part
    alone = patchreg.register(thin, thin, cascade(), "deformable", refine=False)
    assert torch.allclose(whole.moved().data, alone.moved().data)
    return [t.grid.is_part for t in Composite([found.initial]).transforms if isinstance(t, DisplacementField)]


def shift(*voxels):
    matrix = np.eye(4)
    matrix[:3, 3] = voxels
    return matrix


def test_images_in_memory_and_thin_ones(pool, files, tmp_path):
    grid = oriented_grid("RAS", (8.0, 8.0, 8.0), 100.0)
    u = displacement_on(known_transform(5), grid)
    write_vectors(tmp_path / "start.nii", u, grid, nib.Nifti1Header())
    assert pool.run(2, from_memory, files, {"initial_transform": tmp_path / "start.nii"}) == [[True]] * 2


def from_zarr(group, folder, out):
    found = patchreg.register(
        folder / "fixed.ome.zarr", folder / "moving.ome.zarr", cascade(), moving_labels=folder / "labels.nii",
        refine=False, group=group,
    )  # fmt: skip
    found.save(out)
    return found.fixed.volume.grid.gathered(found.moved().data)


def test_ome_zarr_stays_ome_zarr(pool, files, tmp_path):
    pytest.importorskip("zarr")
    for name in ("fixed.nii", "moving.nii.gz"):
        image = read_image(files / name)
        contents = SlabContents(image.volume.grid, 1, image.storage)
        with staged_slabs(files / f"{name.split('.')[0]}.ome.zarr", contents) as sink:
            sink.write(0, image.volume.data)
    moved, _ = pool.run(2, from_zarr, files, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"moved.ome.zarr", "moved_labels.ome.zarr", "uncertainty.ome.zarr", "displacement.nii"} <= names
    written = read_image(tmp_path / "out" / "moved.ome.zarr")
    assert (written.volume.data - moved).abs().max() <= 0.5  # stored as the moving image is


def refused(group, folder, arguments, out=None):
    """What every rank says."""
    with pytest.raises(PatchregError) as caught:
        found = patchreg.register(*arguments, cascade(), "affine", refine=False, group=group)
        found.save(out)
    return str(caught.value)


def accepted(group, path, kind):
    return read_part(path, kind, Ranks(group)).volume.data.any().item()


def test_a_slab_may_be_constant(pool, tmp_path):
    """An image, or a mask, of which one rank has nothing."""
    data = np.zeros((20, 6, 5), np.float32)
    data[1:4] = 1
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "half.nii")
    for kind in ("image", "mask"):
        assert pool.run(2, accepted, tmp_path / "half.nii", kind) == [True, False]


def test_all_ranks_know_what_is_wrong(pool, files, tmp_path):
    """What one rank alone can see, what none can see from its slab, and what the first finds when it writes."""
    fixed, good = nib.load(files / "fixed.nii"), files / "fixed.nii"
    data = np.asanyarray(fixed.dataobj)

    def bad(name, values):
        nib.save(nib.Nifti1Image(values, fixed.affine), tmp_path / name)
        return tmp_path / name

    broken = data.copy()
    broken[-1, 2, 2] = np.nan
    (tmp_path / "file").write_text("")
    for arguments, words in (
        ((good, bad("nan.nii", broken)), "1 of [0-9]+ voxels .* are NaN or infinite"),
        ((bad("flat.nii", np.full_like(data, 3)), good), "every voxel is 3"),
        ((good, bad("series.nii", np.stack([data, data], axis=-1))), "has 2 volumes; give one"),
        ((good, tmp_path / "none.nii"), "none.nii: no such file"),
        ((good, good, tmp_path / "file"), "file: is a file; give a folder"),
    ):
        said = pool.run(2, refused, files, arguments[:2], *arguments[2:])
        assert said[0] == said[1]
        assert re.search(words, said[0]), said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "flat.nii", "nan.nii", "series.nii"]
