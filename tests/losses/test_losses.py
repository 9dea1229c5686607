from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import blobs, known_transform, oriented_grid

from patchreg import ops
from patchreg.errors import InputError
from patchreg.losses import (
    LNCC,
    MSE,
    BendingEnergy,
    Diffusion,
    LabelSet,
    MutualInformation,
    SoftDice,
    centroid_distance_mm,
    dice,
    label_centroids,
    target_error_mm,
)
from patchreg.losses.overlap import overlap_sums
from patchreg.spatial import Affine, Grid, MappedGrid, Volume


def test_similarities_are_losses(generator):
    I, J = (torch.rand((1, 1, 12, 12, 12), generator=generator) for _ in range(2))
    for loss in (LNCC(5), MutualInformation(), MutualInformation(normalized=True), MSE()):
        assert float(loss(I, I)) < float(loss(I, J))
        mask = torch.zeros(1, 1, 12, 12, 12)
        mask[..., :6] = 1
        assert math.isfinite(float(loss(I, J, mask)))
    assert float(LNCC(5)(I, J)) == pytest.approx(1 - float(ops.lncc(I, J, 5)))
    assert float(MSE()(I, J, mask)) == pytest.approx(float((I - J)[..., :6].square().mean()))


def linear_field(grid: Grid, matrix: torch.Tensor) -> torch.Tensor:
    return torch.einsum("cd,ijkd->cijk", matrix.double(), grid.points())[None].float()


def test_diffusion_is_in_world_units(oriented):
    """u(x) = G x has |du/dx|^2 = |G|^2 on every grid, whatever its voxels and orientation."""
    g = torch.tensor([[0.1, 0.02, 0.0], [0.0, -0.2, 0.05], [0.03, 0.0, 0.3]])
    value = Diffusion()(linear_field(oriented, g), oriented.spacing)
    assert float(value) == pytest.approx(float(g.square().sum()), rel=1e-4)


def test_bending_energy_is_zero_for_affine_and_in_world_units(oriented):
    g = torch.tensor([[0.1, 0.02, 0.0], [0.0, -0.2, 0.05], [0.03, 0.0, 0.3]])
    assert float(BendingEnergy()(linear_field(oriented, g), oriented.spacing)) < 1e-6
    x = oriented.points()
    quadratic = torch.stack([0.01 * x[..., 0] * x[..., 1], 0.02 * x[..., 2] ** 2, 0 * x[..., 0]])[None].float()
    # second derivatives: 0.01 twice (xy, yx), and 0.04 (zz)
    expected = 2 * 0.01**2 + 0.04**2
    assert float(BendingEnergy()(quadratic, oriented.spacing)) == pytest.approx(expected, rel=1e-3)
    assert float(BendingEnergy(10.0)(quadratic, oriented.spacing)) == pytest.approx(100 * expected, rel=1e-3)
    with pytest.raises(InputError, match="spacing must be"):
        Diffusion()(quadratic, (1.0, 0.0, 1.0))


def labelled(grid: Grid, seed: int) -> Volume:
    data = blobs(grid, seed).data
    return Volume((data / data.max() * 4.99).int(), grid)


def test_soft_dice_is_that_of_warped_one_hot_maps(oriented):
    """The sums formed without one-hot volumes are those of the one-hot volumes, and so are their gradients."""
    values = [0, 1, 3, 4]  # 2 is left out: it counts as background
    fixed, moving = labelled(oriented, 1), labelled(oriented_grid("LPS", (2.0, 2.0, 2.0)), 1)
    d = known_transform().transforms[0].on(oriented).displacement_mm.clone().requires_grad_()
    mapped = MappedGrid(oriented, known_transform().affine_part().matrix, d)
    here = MappedGrid.identity(oriented)
    both, sizes = overlap_sums(here, fixed, mapped, moving, LabelSet(values))

    one_hot = Volume(torch.stack([(moving.data[0] == v).float() for v in values]), moving.grid)
    warped = mapped.sample(one_hot)[0]
    mine = torch.stack([(fixed.data[0] == v).float() for v in values])
    expected_both, expected_sizes = (warped * mine).sum(dim=(1, 2, 3)), (warped + mine).sum(dim=(1, 2, 3))
    assert torch.allclose(both, expected_both, rtol=1e-3)
    assert torch.allclose(sizes, expected_sizes, rtol=1e-3)
    assert both.min() > 0
    (grad,) = torch.autograd.grad(both.sum() / sizes.sum(), d)
    (expected,) = torch.autograd.grad(expected_both.sum() / expected_sizes.sum(), d)
    assert (grad - expected).norm() < 1e-2 * expected.norm()


def test_soft_dice_is_zero_for_a_match_and_one_apart():
    grid = oriented_grid("RAS", (2.0, 2.0, 2.0))
    labels = labelled(grid, 1)
    here = MappedGrid.identity(grid)
    loss = SoftDice(LabelSet([1, 2, 3, 4]))
    assert float(loss([(here, labels)], [(here, labels)])) < 1e-3
    away = Affine.translation((500.0, 0, 0)).on(grid)
    assert float(loss([(here, labels)], [(away, labels)])) > 0.98


def test_dice_of_label_maps():
    a = torch.tensor([0, 1, 1, 1, 2, 2, 507])
    b = torch.tensor([0, 1, 1, 2, 2, 0, 0])
    values = dice(a, b, [1, 2, 3, 507])
    assert values[0] == pytest.approx(2 * 2 / 5)
    assert values[1] == pytest.approx(2 * 1 / 4)
    assert math.isnan(values[2])
    assert values[3] == 0
    one_hot = F.one_hot(a.clamp(max=3)).float(), F.one_hot(b.clamp(max=3), 4).float()
    assert values[0] == pytest.approx(
        float(2 * (one_hot[0] * one_hot[1])[:, 1].sum() / (one_hot[0] + one_hot[1])[:, 1].sum())
    )


def test_label_sets_are_checked():
    for bad in ([], [1, 1], [-1]):
        with pytest.raises(InputError, match="labels must be different"):
            LabelSet(bad)


def test_centroids_are_in_the_world(oriented):
    volume = Volume(torch.zeros((1, *oriented.shape), dtype=torch.int32), oriented)
    volume.data[0, 3:6, 4, 5] = 7
    found = label_centroids(volume, LabelSet([7, 8]))
    assert torch.allclose(found[0], oriented.to_world(torch.tensor([4.0, 4, 5])))
    assert torch.isnan(found[1]).all()


def test_centroid_distance_pulls_from_afar(oriented):
    """A moving image shifted by 25 mm is 25 mm away before, and at zero with the right translation."""
    labels = labelled(oriented, 1)
    shift = torch.tensor([20.0, 0, -15.0])
    moving = Volume(labels.data, oriented.moved(Affine.translation(shift).matrix))
    chosen = LabelSet([1, 2, 3, 4])
    still = Affine.identity()
    assert float(centroid_distance_mm(labels, moving, still, still, chosen)) == pytest.approx(25.0)
    assert float(centroid_distance_mm(labels, moving, still, Affine.translation(shift), chosen)) == pytest.approx(
        0, abs=1e-3
    )
    warp = Affine.translation((3.0, 4.0, 0.0))  # the fixed image seen through W: its content moves by -W
    value = float(centroid_distance_mm(labels, labels, warp, still, chosen))
    assert value == pytest.approx(5.0, abs=1e-3)


def test_target_error():
    points = torch.rand(5, 3, dtype=torch.float64)
    errors = target_error_mm(Affine.translation((3.0, 0, 4.0)), points, points)
    assert torch.allclose(errors, torch.full((5,), 5.0, dtype=torch.float64))
