from __future__ import annotations

import pytest
import torch
from conftest import blobs, oriented_grid

from patchreg.datasets.augmentation import WorldAugmentation, rotation_matrix
from patchreg.errors import InputError
from patchreg.spatial import folding_percent, foreground, jacobian_determinant


def test_rotations():
    r = rotation_matrix(torch.tensor([0.1, 0.2, -0.3]))
    assert torch.allclose(r @ r.T, torch.eye(3).double())
    quarter = rotation_matrix(torch.tensor([0.0, 0.0, torch.pi / 2]))
    assert torch.allclose(quarter @ torch.tensor([1.0, 0, 0]).double(), torch.tensor([0.0, 1, 0]).double(), atol=1e-7)


def test_affine_draws_stay_in_range_and_turn_about_the_centre(generator):
    center = torch.tensor([10.0, -20, 30])
    for _ in range(20):
        affine = WorldAugmentation(rotation_deg=20, scaling=0.1).draw_affine(center, generator)
        assert torch.allclose(affine(center[None]), center[None].double(), atol=1e-6)
        scales = torch.linalg.svdvals(affine.matrix[:3, :3])
        assert 0.9 < float(scales.min()) <= float(scales.max()) < 1.11
    shift = WorldAugmentation(translation_mm=7).draw_affine(center, generator).matrix[:3, 3]
    assert shift.abs().max() <= 7
    assert torch.equal(WorldAugmentation().draw_affine(center, generator).matrix, torch.eye(4).double())


def test_deformations_are_smooth_invertible_and_of_the_asked_size(generator):
    grid = oriented_grid("RAS", (2.0, 2.0, 2.0))
    content = foreground(blobs(grid))
    augmentation = WorldAugmentation(deformation_mm=10.0)
    largest = []
    for _ in range(10):
        mapped = augmentation.draw_warp(content, generator).on(grid)
        largest.append(float(mapped.total_displacement_mm().norm(dim=1).max()))
        assert folding_percent(jacobian_determinant(mapped)) == 0
    assert 3 < max(largest) < 11
    assert WorldAugmentation().draw_warp(content, generator).on(grid).displacement_mm is None


def test_bad_ranges():
    with pytest.raises(InputError, match="must not be negative"):
        WorldAugmentation(rotation_deg=-1)
