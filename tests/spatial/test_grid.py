from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from patchreg.errors import GeometryError
from patchreg.spatial import Grid


def test_voxel_centres_are_where_nibabel_has_them(oriented):
    corner = torch.tensor([n - 1.0 for n in oriented.shape])
    expected = nib.affines.apply_affine(oriented.affine.numpy(), corner.numpy())
    assert np.allclose(oriented.to_world(corner).numpy(), expected)
    assert torch.allclose(oriented.to_voxel(oriented.to_world(corner)), corner.double())


def test_orientation_and_spacing_agree_with_nibabel(oriented):
    assert oriented.orientation == "".join(nib.aff2axcodes(oriented.affine.numpy()))
    assert np.allclose(oriented.spacing, nib.affines.voxel_sizes(oriented.affine.numpy()))
    assert abs(oriented.voxel_volume - 15.0) < 1e-9


def test_centre_and_bounds(oriented):
    assert torch.allclose(oriented.center, torch.zeros(3).double(), atol=1e-9)
    low, high = oriented.bounds()
    assert torch.allclose(low, -high)
    assert bool(oriented.contains(oriented.corners() * 0.999).all())
    assert not bool(oriented.contains(oriented.corners() * 1.001).any())


def test_crop_and_pad_keep_places(oriented):
    part = oriented.crop((2, 3, 1), (4, 5, 6))
    assert torch.allclose(part.to_world(torch.zeros(3)), oriented.to_world(torch.tensor([2.0, 3, 1])))
    assert torch.allclose(part.padded(2).to_world(torch.full((3,), 2.0)), part.to_world(torch.zeros(3)))


def test_with_spacing_keeps_the_box(oriented):
    finer = oriented.with_spacing(1.0)
    for a, b in zip(finer.bounds(), oriented.bounds(), strict=True):
        assert torch.allclose(a, b)
    assert all(abs(s - 1) < 0.05 for s in finer.spacing)


def test_slabs_cover_everything_once(oriented):
    seen = torch.zeros(oriented.shape)
    for where, slab in oriented.slabs(3 * oriented.shape[1] * oriented.shape[2]):
        seen[where] += 1
        assert torch.allclose(slab.points(), oriented.points()[where])
    assert bool((seen == 1).all())


def test_equality_and_immutability(oriented):
    affine = oriented.affine.numpy().copy()
    twin = Grid(oriented.shape, affine)
    affine[0, 0] = 99  # the grid keeps its own copy
    assert twin == oriented
    assert hash(twin) == hash(oriented)
    assert twin != oriented.crop((1, 0, 0), oriented.shape)
    with pytest.raises(AttributeError):
        twin.shape = (1, 1, 1)


@pytest.mark.parametrize(
    ("shape", "affine", "says"),
    [
        ((4, 4), np.eye(4), "three positive sizes"),
        ((4, 4, 0), np.eye(4), "three positive sizes"),
        ((4, 4, 4), np.eye(3), "shape"),
        ((4, 4, 4), np.diag([1, 1, 0, 1]), "singular"),
        ((4, 4, 4), np.diag([1, np.nan, 1, 1]), "NaN"),
        ((4, 4, 4), np.array([[1, 2, 3, 0], [2, 4, 6, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "singular"),
        ((4, 4, 4), np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1.0]]), "last row"),
    ],
)
def test_bad_grids_are_refused(shape, affine, says):
    with pytest.raises(GeometryError, match=says):
        Grid(shape, affine)


def test_tiny_voxels_are_not_singular():
    assert Grid((4, 4, 4), np.diag([1e-4, 1e-4, 1e-4, 1])).voxel_volume > 0
