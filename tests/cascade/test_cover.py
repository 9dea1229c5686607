from __future__ import annotations

import pytest
import torch
from cascade_parts import Constant, ConstantAffine, Pointwise, made_pair, prepared, small_cascade
from conftest import blobs, known_transform, oriented_grid

from patchreg.cascade import PatchCascade, Stage
from patchreg.spatial import Affine, DisplacementField


def test_patches_equal_the_whole_where_they_must():
    """A network that looks at one voxel at a time: covering with patches is running it on the whole lattice."""
    pair = made_pair()
    whole = PatchCascade([Stage(Pointwise(), spacing="image")]).register(pair.fixed, pair.moving)
    patched = PatchCascade([Stage(Pointwise(), patch_shape=16, spacing=2.0, margin_mm=200.0)]).register(
        pair.fixed, pair.moving
    )
    lattice = patched.transform.transforms[0].grid
    assert lattice.shape == pair.fixed.volume.grid.shape
    assert torch.allclose(lattice.affine, pair.fixed.volume.grid.affine)
    a, b = (r.transform.transforms[0].displacement_mm for r in (whole, patched))
    assert torch.allclose(a, b, atol=1e-4)
    assert a.abs().max() > 0.5
    assert patched.spread.data.max() < 0.02
    assert whole.spread is None


def test_constant_answers_add_up_over_stages():
    pair = made_pair("oblique", "LPS")
    quarter_turn = torch.tensor([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]])
    stages = [
        Stage(ConstantAffine(quarter_turn), "affine", 16),
        Stage(Constant((1.0, 0, 0)), patch_shape=16, spacing=4.0),
        Stage(Constant((0, 1.0, 0)), patch_shape=16, spacing=2.0),
    ]
    found = PatchCascade(stages).register(pair.fixed, pair.moving)
    x = torch.tensor([[5.0, 6, 7]], dtype=torch.float64)
    shifted = x + torch.tensor([4.0, 2.0, 0])
    assert torch.allclose(found.transform(x), found.affine(shifted), atol=1e-4)
    assert [type(t) for t in found.transform.transforms[:2]] == [DisplacementField, DisplacementField]


def test_batches_and_devices_do_not_change_the_answer():
    pair, cascade = made_pair(), small_cascade()
    x = oriented_grid("RAS", (10.0, 10.0, 10.0)).points().reshape(-1, 3)
    one = cascade.register(pair.fixed, pair.moving, batch=1).transform(x)
    many = cascade.register(pair.fixed, pair.moving, batch=7).transform(x)
    assert (one - many).abs().max() < 1e-3


def test_random_passes_give_a_spread_and_depend_on_the_seed():
    pair = made_pair()

    class Uneven(torch.nn.Module):
        """Answers by the place within the patch, so that other patches answer otherwise."""

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, fixed, moving):
            ramp = torch.linspace(-1, 1, fixed.shape[2])[:, None, None].expand(fixed.shape[2:])
            return torch.stack([ramp, ramp, ramp])[None].expand(fixed.shape[0], -1, -1, -1, -1)

    stage = Stage(Uneven(), patch_shape=16, spacing=3.0, passes=3)
    cascade = PatchCascade([stage])
    found = [cascade.register(pair.fixed, pair.moving, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(found[0].spread.data, found[1].spread.data)
    assert not torch.equal(found[0].spread.data, found[2].spread.data)
    regular = cascade.register(pair.fixed, pair.moving, passes=1)
    assert found[0].spread.data.mean() > 0.1
    assert found[0].spread.grid == found[0].transform.transforms[0].grid
    a, b = (r.transform.transforms[0].displacement_mm for r in (found[0], regular))
    assert not torch.equal(a, b)
    flat = (r.diff(dim=2).abs().max() for r in (a, b))
    assert next(flat) < next(flat) * 1.5  # more passes do not make seams


def test_parts_can_be_run_one_after_the_other():
    pair, cascade = made_pair(), small_cascade()
    whole = cascade.register(pair.fixed, pair.moving)
    affine = cascade.register(pair.fixed, pair.moving, parts="affine")
    rest = cascade.register(pair.fixed, pair.moving, affine.affine, parts="deformable")
    x = oriented_grid("RAS", (10.0, 10.0, 10.0)).points().reshape(-1, 3)
    assert (whole.transform(x) - rest.transform(x)).abs().max() < 1e-4
    assert all(isinstance(t, Affine) for t in affine.transform.transforms)


def test_progress_is_told():
    pair, told = made_pair(), []
    small_cascade().register(pair.fixed, pair.moving, progress=lambda *a: told.append(a), batch=4)
    assert told[0] == ("stage 1 of 3: affine", 1, 1)
    name, done, total = told[-1]
    assert name == "stage 3 of 3: displacement"
    assert done == total > 4


def test_training_mode_is_left_as_it_was():
    pair, cascade = made_pair(), small_cascade()
    cascade.train()
    cascade.register(pair.fixed, pair.moving)
    assert cascade.training


@pytest.mark.parametrize("orientation", ["LAS", "LPS", "LIA"])
def test_the_same_pair_stored_otherwise_gives_the_same_transform(orientation):
    """Untrained networks with large answers, which double every difference: storage leaves none."""
    cascade = small_cascade()
    for stage in cascade.stages[1:]:
        torch.nn.init.normal_(stage.network.flow.weight, std=0.3)
    torch.nn.init.normal_(cascade.stages[0].network.head.weight, std=0.1)
    x = 0.6 * oriented_grid("RAS", (8.0, 8.0, 8.0)).points().reshape(-1, 3)
    ours, theirs = (
        cascade.register(pair.fixed, pair.moving).transform(x)
        for pair in (made_pair(), made_pair(orientation, orientation))
    )
    moved = (ours - x).norm(dim=1)
    assert (ours - theirs).norm(dim=1).max() < 0.01
    assert moved.mean() > 1


def test_empty_places_are_no_trouble():
    """A fixed image much larger than its content, and one smaller than a patch."""
    cascade = small_cascade()
    large = prepared(blobs(oriented_grid("RAS", (4.0, 4.0, 4.0), extent_mm=300)))
    small = prepared(blobs(oriented_grid("RAS", (4.0, 4.0, 4.0), extent_mm=24)))
    for fixed, moving in ((large, small), (small, large)):
        found = cascade.register(fixed, moving)
        assert all(
            torch.isfinite(t.displacement_mm).all()
            for t in found.transform.transforms
            if isinstance(t, DisplacementField)
        )


def test_the_fixed_image_is_seen_through_its_warp():
    """As in training: what is measured in validation is what the networks saw."""
    pair = made_pair()
    warp = known_transform(seed=4, size_mm=8.0, affine=False)
    stage = Stage(Constant((0.0, 0, 0)), patch_shape=16, spacing="whole")
    cascade = PatchCascade([stage])
    cascade.register(pair.fixed, pair.moving)
    cascade.register(pair.fixed, pair.moving, fixed_warp=warp)
    (plain, moving), (warped, same) = stage.network.seen
    grid = stage.lattice(pair.fixed.content, pair.fixed.volume.grid)
    assert torch.allclose(warped, warp.on(grid).sample(pair.fixed.at(min(grid.spacing))), atol=1e-5)
    assert (warped - plain).abs().max() > 0.1
    assert torch.equal(moving, same)
