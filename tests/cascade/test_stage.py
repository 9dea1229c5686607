from __future__ import annotations

import pytest
import torch
from cascade_parts import Constant, ConstantAffine, prepared
from conftest import blobs, oriented_grid

from patchreg.cascade import PatchCascade, Stage
from patchreg.cascade.stage import frame
from patchreg.errors import InputError
from patchreg.networks import VoxelMorph
from patchreg.spatial import Grid


@pytest.fixture
def content():
    return prepared(blobs(oriented_grid("RAS", (2.0, 2.0, 2.0)))).content


def test_whole_patch_sees_all_content(content, oriented):
    grid = Stage(Constant((0, 0, 0)), patch_shape=(16, 20, 24)).lattice(content, oriented)
    assert grid.shape == (16, 20, 24)
    assert len({round(s, 9) for s in grid.spacing}) == 1
    low, high = grid.bounds()
    assert bool((low <= content.low_mm - 10 + 1e-6).all())
    assert bool((high >= content.high_mm + 10 - 1e-6).all())


def test_image_stage_is_the_image(content, oriented):
    stage = Stage(Constant((0, 0, 0)), spacing="image")
    assert stage.lattice(content, oriented) is oriented
    assert stage.draw(content, oriented, None, None) is oriented


def test_lattice_is_at_least_a_patch(content, oriented):
    stage = Stage(Constant((0, 0, 0)), patch_shape=96, spacing=2.0)
    assert min(stage.lattice(content, oriented).shape) == 96


def test_drawn_patches_are_nested_in_their_parents(content, oriented, generator):
    parent = Stage(Constant((0, 0, 0)), patch_shape=16, spacing=3.0).draw(content, oriented, None, generator)
    stage = Stage(Constant((0, 0, 0)), patch_shape=12, spacing=1.0)
    places = set()
    for _ in range(20):
        child = stage.draw(content, oriented, parent, generator)
        assert child.shape == (12, 12, 12)
        assert child.spacing == pytest.approx((1, 1, 1))
        for child_end, parent_end, sign in zip(child.bounds(), parent.bounds(), (1, -1), strict=True):
            assert bool((sign * (child_end - parent_end) > -1e-6).all())
        places.add(tuple(child.center.tolist()))
    assert len(places) == 20


def test_too_large_a_child_is_centred(content, oriented, generator):
    parent = Grid.aligned((5.0, 0, 0), (8, 8, 8), 1.0)
    child = Stage(Constant((0, 0, 0)), patch_shape=32, spacing=1.0).draw(content, oriented, parent, generator)
    assert torch.allclose(child.center, parent.center)


def test_answers_are_turned_into_mm(generator):
    grids = [oriented_grid("LPS", (2.0, 3.0, 4.0)).crop((0, 0, 0), (8, 8, 8)) for _ in range(2)]
    patch = torch.rand((2, 1, 8, 8, 8), generator=generator)
    u = Stage(Constant((1.0, 2.0, 3.0)), patch_shape=8, spacing=2.0).predict(patch, patch, grids)
    assert torch.allclose(u[0, :, 0, 0, 0], torch.tensor([-2.0, -6.0, 12.0]), atol=1e-5)
    velocity = Stage(Constant((1.0, 2.0, 3.0)), "velocity", 8, 2.0).predict(patch, patch, grids)
    assert torch.allclose(velocity, u, atol=1e-3)  # a constant velocity flows into itself


def test_affine_answers_are_turned_into_the_world():
    """In the frame the longest side is -1..1 about the centre, and a rotation stays a rotation."""
    grid = Grid.aligned((10.0, 20.0, 30.0), (8, 16, 8), 2.0)
    patch = torch.zeros(1, 1, *grid.shape)
    matrix = torch.tensor([[0.0, -1, 0, 0.5], [1, 0, 0, 0], [0, 0, 1, 0]])
    found = Stage(ConstantAffine(matrix), "affine", (8, 16, 8)).predict(patch, patch, [grid])[0]
    assert torch.allclose(found[:3, :3], matrix[:, :3].double())
    center = torch.cat([grid.center, torch.ones(1)])
    assert torch.allclose((found @ center)[:3], grid.center + torch.tensor([0.5 * 16.0, 0, 0]))
    assert torch.allclose(frame(grid)[:3, 3], grid.center)


def test_wrong_answers_are_named():
    stage = Stage(VoxelMorph((4, 8), (8,), ()), "affine", 8)
    patch = torch.zeros(1, 1, 8, 8, 8)
    with pytest.raises(InputError, match=r"VoxelMorph must answer affine of shape \(1, 3, 4\)"):
        stage.predict(patch, patch, [Grid.aligned((0, 0, 0), (8, 8, 8), 1.0)])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"predicts": "rigid"}, "predicts must be"),
        ({"spacing": "coarse"}, "spacing must be"),
        ({"spacing": (1.0, 2.0)}, "spacing must be one or three"),
        ({"spacing": -1.0}, "spacing must be one or three"),
        ({"patch_shape": 0}, "patch_shape must be"),
        ({"overlap": 1.0}, "overlap must be"),
        ({"passes": 0}, "passes must be at least 1"),
    ],
)
def test_bad_settings(arguments, says):
    with pytest.raises(InputError, match=says):
        Stage(Constant((0, 0, 0)), **arguments)


def test_order_of_stages():
    affine, deformable = (lambda: Stage(Constant((0, 0, 0)), "affine")), (lambda: Stage(Constant((0, 0, 0))))
    with pytest.raises(InputError, match="affine stages must come before"):
        PatchCascade([affine(), deformable(), affine()])
    with pytest.raises(InputError, match="at least one stage"):
        PatchCascade([])
