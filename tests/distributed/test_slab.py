"""A grid that is a part of a larger one: images, pyramids, chains and losses on it are those of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks.comparison import limit, random, smooth

from patchreg.distributed.partition import Partition
from patchreg.distributed.slab import Slab, partition_of, split_volume
from patchreg.losses import LNCC, MSE, BendingEnergy, Diffusion, LabelSet, MutualInformation, SoftDice
from patchreg.spatial import Grid, MappedGrid, Volume

SHAPE = (17, 12, 10)


def oblique(shape=SHAPE, spacing=(1.0, 1.3, 2.0), degrees=11.0, offset=(3.0, -4.0, 5.0)):
    turn = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    affine = torch.eye(4, dtype=torch.float64)
    c, s = torch.cos(turn), torch.sin(turn)
    affine[:3, :3] = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64) @ torch.diag(
        torch.tensor(spacing, dtype=torch.float64)
    )
    affine[:3, 3] = torch.tensor(offset, dtype=torch.float64)
    return Grid(shape, affine)


def local_part(whole, grid):
    """What of a whole tensor (C or B, C, ...) lies on a grid that may be a part."""
    if not isinstance(grid, Slab):
        return whole
    start, stop = grid.partition.bounds(grid.rank)
    return whole.narrow(grid.partition.dim - (5 - whole.ndim), start, stop - start)


def check(name, found, whole, grid, dtype):
    expected = local_part(whole, grid)
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    wrong = float(
        (found.detach().double() - expected.detach().double()).abs().max() / whole.detach().abs().max().clamp(min=1e-30)
    )
    assert wrong < limit(dtype), (name, wrong)


def reading(group, dtype, image_dim, points_dim, points_shared):
    """Sampling with every kind of image and points; gradients to image, displacement and matrix."""
    fixed_grid, moving_grid = oblique(), oblique((13, 14, 11), (1.2, 1.0, 1.7), -7.0, (1.0, -2.0, 6.0))
    data = smooth((1, 2, *moving_grid.shape), 1, dtype)
    d = (4 * random((1, 3, *fixed_grid.shape), 2, torch.float64, grad=False) - 2).to(dtype).requires_grad_()
    matrix = (torch.eye(4, dtype=torch.float64) + 0.02 * random((4, 4), 3, grad=False)).detach()
    matrix[3] = torch.tensor([0.0, 0, 0, 1])
    matrix.requires_grad_()
    weight = random((1, 2, *fixed_grid.shape), 4, dtype, grad=False)

    expected = MappedGrid(fixed_grid, matrix, d).sample(Volume(data[0], moving_grid))
    wanted = torch.autograd.grad((expected * weight).sum(), [data, d, matrix])

    ranks = dist.get_world_size(group)
    place = (
        Slab(moving_grid, Partition.even(moving_grid.shape[image_dim - 2], ranks, image_dim), group)
        if image_dim
        else moving_grid
    )
    onto = (
        Slab(fixed_grid, Partition.even(fixed_grid.shape[points_dim - 2], ranks, points_dim), group)
        if points_shared
        else fixed_grid
    )
    mine = local_part(data.detach(), place).clone().requires_grad_()
    u = local_part(d.detach(), onto).clone().requires_grad_()
    m = matrix.detach().clone().requires_grad_()
    found = MappedGrid(onto, m, u).sample(Volume(mine[0], place))
    check("value", found, expected, onto, dtype)
    grads = torch.autograd.grad((found * local_part(weight, onto)).sum(), [mine, u, m])
    check("image gradient", grads[0], wanted[0], place, dtype)
    check("displacement gradient", grads[1], wanted[1], onto, dtype)
    check("matrix gradient", grads[2], wanted[2], None, dtype)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    ("image_dim", "points_dim", "points_shared"),
    [(2, 2, True), (2, 3, True), (4, 3, True), (3, 2, False), (0, 4, True)],
)
def test_reading(pool, ranks, image_dim, points_dim, points_shared):
    pool.run(ranks, reading, torch.float64, image_dim, points_dim, points_shared)


def test_reading_in_single_precision(pool):
    pool.run(2, reading, torch.float32, 2, 2, True)


def pyramids(group, dim):
    for shape in ((17, 12, 10), (16, 13, 11), (9, 9, 9), (23, 23, 23)):
        grid = oblique(shape)
        volume = Volume(smooth((1, 2, *shape), 5, grad=False)[0], grid, "made")
        labels = Volume((6 * smooth((1, 1, *shape), 6, grad=False)[0]).round().to(torch.int32), grid)
        part, label_part = split_volume(volume, group, dim), split_volume(labels, group, dim)
        assert isinstance(part.grid, Slab)
        check("cut", part.data, volume.data, part.grid, torch.float64)
        for factors in ((2, 2, 2), (3, 1, 2), (1, 3, 4), (4, 5, 3), (9, 9, 9), (50, 50, 50)):
            for name, a, b in (
                ("pooled", part.pooled(factors), volume.pooled(factors)),
                ("thinned", label_part.thinned(factors), labels.thinned(factors))
                if max(factors) <= min(shape)
                else ("same", part, volume),
            ):
                assert torch.allclose(a.grid.whole.affine, b.grid.affine, atol=1e-12), (shape, factors, name)
                assert a.grid.whole.shape == b.grid.shape
                check((shape, factors, name), a.data, b.data, a.grid, torch.float64)
        small, expected = part.thumbnail(200), volume.thumbnail(200)
        assert small.grid == expected.grid
        check("thumbnail", small.data, expected.data.double(), None, torch.float32)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dim", [2, 4])
def test_coarser_copies(pool, ranks, dim):
    pool.run(ranks, pyramids, dim)


def losses(group):
    grid, dtype = oblique((18, 12, 10)), torch.float64
    images = [smooth((1, 1, *grid.shape), n, dtype) for n in (1, 2)]
    u = smooth((1, 3, *grid.shape), 3, dtype)
    part = Slab(grid, Partition.even(18, dist.get_world_size(group)), group)
    for loss, tensors, more in (
        (LNCC(5), images, ()),
        (MSE(), images, ()),
        (MutualInformation(8), images, ()),
        (Diffusion(), [u], (grid.spacing,)),
        (BendingEnergy(2.0), [u], (grid.spacing,)),
    ):
        expected = loss(*tensors, *more)
        wanted = torch.autograd.grad(expected, tensors)
        mine = [local_part(t.detach(), part).clone().requires_grad_() for t in tensors]
        found = part.measure(loss, *mine, *more)
        check(type(loss).__name__, found, expected, None, dtype)
        for a, b in zip(torch.autograd.grad(found, mine), wanted, strict=True):
            check(type(loss).__name__, a, b, part, dtype)


def overlap(group, moving_dim):
    """Soft Dice of two patches at once, strided, of labels on grids of their own; and centres of labels."""
    from patchreg.losses.points import label_centroids

    ranks = dist.get_world_size(group)
    fixed_grid, moving_grid, patch = (
        oblique(),
        oblique((13, 14, 11), (1.2, 1.0, 1.7), -7.0, (1.0, -2.0, 6.0)),
        oblique((16, 9, 9)),
    )
    fixed, moving = (
        Volume((4 * smooth((1, 1, *g.shape), n, grad=False)[0]).round().to(torch.int32), g)
        for n, g in ((7, fixed_grid), (8, moving_grid))
    )
    labels = LabelSet([1, 2, 3])
    fields = [smooth((1, 3, *patch.shape), n, torch.float64) for n in (9, 10)]

    def sampled(grid, fixed_labels, moving_labels, fields):
        identity = torch.eye(4, dtype=torch.float64)
        fixed_points = [(MappedGrid.identity(grid).strided(2, (1, 0, 1)), fixed_labels) for _ in fields]
        moving_points = [(MappedGrid(grid, identity, u).strided(2, (1, 0, 1)), moving_labels) for u in fields]
        return fixed_points, moving_points

    expected = SoftDice(labels)(*sampled(patch, fixed, moving, fields))
    wanted = torch.autograd.grad(expected, fields)
    part = Slab(patch, Partition.even(16, ranks), group)
    mine = [local_part(u.detach(), part).clone().requires_grad_() for u in fields]
    held = split_volume(moving, group, moving_dim) if moving_dim else moving
    found = part.strided(2, (1, 0, 1))[1].measure(
        SoftDice(labels), *sampled(part, split_volume(fixed, group, 2), held, mine)
    )
    check("soft Dice", found, expected, None, torch.float32)
    for a, b in zip(torch.autograd.grad(found, mine), wanted, strict=True):
        check("gradient", a, b, part, torch.float32)
    for whole, split in ((fixed, split_volume(fixed, group, 2)), (moving, held)):
        check("centroids", label_centroids(split, labels), label_centroids(whole, labels), None, torch.float64)


def test_losses(pool):
    pool.run(3, losses)


@pytest.mark.parametrize("moving_dim", [2, 4, 0])
def test_overlap(pool, moving_dim):
    pool.run(2, overlap, moving_dim)


def test_cuts_are_aligned_where_that_costs_little():
    assert partition_of((160, 192, 224), 4).sizes == (56,) * 4
    assert partition_of((160, 160, 160), 4).sizes == (40,) * 4
    assert partition_of((160, 160, 160), 3).sizes == (56, 52, 52)
    assert partition_of((100, 10, 10), 4).sizes == (26, 26, 24, 24)
    assert partition_of((7, 7, 7), 4) is None
    assert partition_of((512, 512, 512), 4).sizes == (128,) * 4


def test_slabs_are_alike_whatever_the_numbers():
    for ranks in (2, 3, 8, 16, 32, 64, 100):
        for total in (*range(2 * ranks, 12 * ranks), 488, 496, 994, 2016):
            found = partition_of((total, 2, 2), ranks, 2)
            if total >= 2 * ranks:
                assert max(found.sizes) - min(found.sizes) <= max(1, 0.1 * total / ranks), (ranks, total, found.sizes)
