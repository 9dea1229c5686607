from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks.comparison import CASES, error, limit, random, slab, slab_error, smooth, split

from patchreg import distributed, losses, ops
from patchreg.distributed import Partition, windowed
from patchreg.errors import InputError
from patchreg.losses import LabelSet, SoftDice
from patchreg.spatial import Grid, MappedGrid, Volume

SPACING = (1.5, 2.0, 0.75)


def whole_value(name, inputs, options):
    """A loss of whole volumes, in one process, by the reference."""
    if name == "lncc":
        return ops.lncc(*inputs, **options, backend="reference")
    if name == "mutual_information":
        return ops.mutual_information(*inputs, **options, backend="reference")
    if name == "mse":
        return losses.MSE()(*inputs, **options)
    if name == "diffusion":
        return losses.Diffusion()(*inputs, SPACING)
    return losses.BendingEnergy(2.0)(*inputs, SPACING)


def split_value(name, inputs, partition, options, group):
    if name in ("diffusion", "bending_energy"):
        more = {"scale_mm": 2.0} if name == "bending_energy" else {}
        return getattr(distributed, name)(*inputs, partition, SPACING, group=group, **more)
    return getattr(distributed, name)(*inputs, partition, group=group, **options)


def compare(group, name, partition, dtype, options):
    """Errors of the value and of the gradients against one process in float64; and the value."""
    options = dict(options)
    windowed.NUMBERS = options.pop("numbers", 1 << 22)
    batch, scale = options.pop("batch", 2), options.pop("intensity", 1.0)
    shape = [12, 11, 10]
    shape[partition.dim - 2] = partition.total
    channels = 3 if name in ("diffusion", "bending_energy") else 2
    count = 1 if channels == 3 else 2
    rounded = [(scale * smooth((batch, channels, *shape), n, grad=False)).to(dtype) for n in range(1, count + 1)]
    whole = [x.double().requires_grad_() for x in rounded]
    whole_options, own_options = dict(options), dict(options)
    if options.get("mask"):
        batches = 1 if options["mask"] == "shared" else batch
        mask = random((batches, 1, *shape), 7, grad=False)
        mask = mask * (mask > 0.4) if name != "lncc" else (mask > 0.3).double()
        whole_options["mask"], own_options["mask"] = mask, slab(mask.to(dtype), partition, group)
    value = whole_value(name, whole, whole_options)
    grads = torch.autograd.grad(3 * value, whole)

    own = [slab(x.to(dtype), partition, group) for x in whole]
    found = split_value(name, own, partition, own_options, group)
    (3 * found).backward()
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    errors = [error(found, value)] + [slab_error(o.grad, g, partition, group) for o, g in zip(own, grads, strict=True)]
    return errors, float(found)


def check(pool, name, ranks, partition, dtype=torch.float64, allowed=None, **options):
    answers = pool.run(ranks, compare, name, partition, dtype, options)
    for errors, _ in answers:
        assert max(errors) < (allowed or limit(dtype)), (name, errors, partition, dtype, options)
    assert len({value for _, value in answers}) == 1


CASES_OF = {
    "lncc": [{"window": 5}, {"window": 9, "mask": "own"}, {"window": 3, "kernel": "gaussian", "mask": "shared"}],
    "mutual_information": [
        {},
        {"mask": "shared", "normalized": True},
        {"window": "gaussian", "fixed_range": (0.1, 0.8)},
    ],
    "mse": [{}, {"mask": "own"}, {"mask": "shared"}],
    "diffusion": [{}],
    "bending_energy": [{}],
}


@pytest.mark.parametrize("name", CASES_OF)
@pytest.mark.parametrize(("ranks", "shares"), CASES)
def test_value_and_gradients_of_one_process(pool, name, ranks, shares):
    for options, dim in itertools.product(CASES_OF[name], (2, 3, 4)):
        check(pool, name, ranks, split(12, shares, dim), **options)


@pytest.mark.parametrize("name", CASES_OF)
def test_kernels_in_float32(pool, name):
    for (ranks, shares), options in itertools.product(CASES, CASES_OF[name]):
        check(pool, name, ranks, split(12, shares), torch.float32, **options)


@pytest.mark.parametrize("name", ["lncc", "diffusion", "bending_energy", "mse"])
def test_slabs_in_portions(pool, name):
    """Some planes at a time, with and without those of other ranks; slabs thinner than the window, all in one."""
    window = {"window": 3} if name == "lncc" else {}
    check(pool, name, 2, Partition((50, 39)), numbers=1, **window)
    check(pool, name, 3, Partition((50, 1, 60)), numbers=1, batch=1, **window)
    check(pool, name, 4, Partition((1, 1, 2, 1)), **window)
    check(pool, name, 3, Partition((0, 6, 0), 4), **window)


def test_raw_scanner_intensities(pool):
    for name, dtype in itertools.product(("lncc", "mutual_information"), (torch.float64, torch.float32)):
        check(pool, name, 3, Partition((5, 3, 4)), dtype, intensity=4000.0)


@pytest.mark.parametrize("name", CASES_OF)
def test_half_precision(pool, name, tolerances):
    for dtype in (torch.float16, torch.bfloat16):
        check(pool, name, 2, Partition((7, 5)), dtype, tolerances.half)


def without_gradients(group):
    partition = Partition((4, 4, 4))
    I, J = smooth((1, 1, 12, 8, 8), 1), smooth((1, 1, 12, 8, 8), 2)
    own_I, own_J = slab(I.detach(), partition, group), slab(J, partition, group)
    values = [distributed.lncc(own_I, own_J, partition, 5, group=group)]
    with torch.no_grad():
        values.append(distributed.lncc(own_I, own_J, partition, 5, group=group))
    values[0].backward()
    (grad,) = torch.autograd.grad(ops.lncc(I, J, 5), J)
    return own_I.grad is None, slab_error(own_J.grad, grad, partition, group), float((values[0] - values[1]).abs())


def test_only_gradients_that_are_wanted(pool):
    for none, gradient, difference in pool.run(3, without_gradients):
        assert none
        assert max(gradient, difference) < 1e-12


def overlap(group, partition, output, still):
    """Soft Dice of two label maps seen through an affine map and a displacement."""
    dim, rank = partition.dim, dist.get_rank(group)
    shape, out_shape = [14, 12, 11], [12, 11, 10]
    shape[dim - 2], out_shape[dim - 2] = partition.total, output.total
    moving, fixed = ((6 * smooth((2, 1, *s), n, grad=False)).to(torch.int16) for n, s in ((1, shape), (2, out_shape)))
    u = (4 * smooth((2, 3, *out_shape), 3, torch.float32, grad=False) - 2).requires_grad_(not still)
    affine = torch.tensor([[1.02, 0.03, 0, -0.4], [0.01, 0.98, 0, 0.6], [0, -0.02, 1.01, 0.2]], dtype=torch.float64)
    affine.requires_grad_(not still)
    labels = LabelSet([0, 1, 2, 4])

    world = torch.eye(4, dtype=torch.float64)
    here, there = Grid(out_shape, world), Grid(shape, world)
    matrix = torch.cat([affine, world[3:]])
    points = [MappedGrid(here, matrix, None if still else u[b : b + 1]) for b in range(2)]
    value = SoftDice(labels)(
        [(MappedGrid.identity(here), Volume(fixed[b], here)) for b in range(2)],
        [(points[b], Volume(moving[b], there)) for b in range(2)],
    )
    own_u, own_affine = slab(u, output, group), affine.detach().clone().requires_grad_(not still)
    found = distributed.soft_dice(
        output.cut(fixed, rank),
        partition.cut(moving, rank),
        labels,
        partition,
        None if still else own_u,
        own_affine,
        output,
        group=group,
    )
    errors = [error(found, value)]
    if not still:
        grads = torch.autograd.grad(value, [u, affine])
        found.backward()
        errors += [slab_error(own_u.grad, grads[0], output, group), error(own_affine.grad, grads[1])]
    return errors


@pytest.mark.parametrize(("ranks", "shares"), CASES)
def test_soft_dice(pool, ranks, shares):
    for dim in (2, 3):
        partition, output = split(14, shares, dim), split(12, tuple(reversed(shares)), dim)
        assert max(map(max, pool.run(ranks, overlap, partition, output, False))) < limit(torch.float32)
    assert max(map(max, pool.run(ranks, overlap, split(14, shares), split(12, shares), True))) < limit(torch.float32)


def empty_mask(group):
    partition = Partition((3, 3))
    I, mask = torch.rand(1, 1, 3, 4, 4), torch.zeros(1, 1, 3, 4, 4)
    for name in ("lncc", "mutual_information"):
        with pytest.raises(InputError, match="mask is empty"):
            getattr(distributed, name)(I, I, partition, mask=mask, group=group)
    mask[..., dist.get_rank(group), 0] = 1 - dist.get_rank(group)  # one rank's is empty, the whole is not
    return all(
        bool(getattr(distributed, n)(I, I, partition, mask=mask, group=group).isfinite())
        for n in ("lncc", "mse", "mutual_information")
    )


def test_masks_may_be_empty_on_some_ranks(pool):
    assert all(pool.run(2, empty_mask))
