from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks.comparison import CASES, random, slab, slab_error, split
from torch.distributed.device_mesh import DeviceMesh

from patchreg.distributed import Partition, add_up, gather, repartition, scatter, share


def there_and_back(group, partition, dtype):
    """A volume scattered, changed, moved to other slabs and gathered, with the gradients of the same on whole volumes."""
    shape = [2, 2, 4, 3, 5]
    shape[partition.dim] = partition.total
    whole = random(tuple(shape), 1, dtype)
    weight, direction = random(tuple(shape), 2, dtype, False), random(tuple(shape), 3, dtype, False)
    rank = dist.get_rank(group)
    new = Partition(tuple(reversed(partition.sizes)), partition.dim)
    local = scatter(whole, partition, group)
    assert torch.equal(local, partition.cut(whole, rank))
    moved = repartition(local.square(), partition, new, group)
    assert torch.equal(moved, new.cut(whole.square(), rank))
    together = gather(moved * new.cut(weight, rank), new, group)
    assert torch.equal(together, whole.square() * weight)
    (grad,) = torch.autograd.grad((together * direction).sum(), whole)
    return float((grad - 2 * whole * weight * direction).abs().max())


@pytest.mark.parametrize(("ranks", "shares"), CASES)
def test_scatter_repartition_and_gather(pool, ranks, shares):
    for dim in (2, 3, 4):
        assert max(pool.run(ranks, there_and_back, split(9, shares, dim), torch.float64)) < 1e-14
    assert max(pool.run(ranks, there_and_back, split(9, shares), torch.float16)) < 1e-2


def labels(group):
    partition = Partition((2, 3))
    whole = torch.arange(5, dtype=torch.int16)[None, None, :, None, None].expand(1, 1, 5, 2, 2)
    return torch.equal(gather(scatter(whole, partition, group), partition, group), whole)


def test_integers_go_round(pool):
    assert all(pool.run(2, labels))


def layer(group, partition):
    """A bias used on slabs, by ``share`` or added up afterwards, and a gain used on a sum over all ranks."""
    whole, bias, gain = random((1, 2, partition.total, 3, 3), 1), random((2, 1, 1, 1), 2), random((), 3)
    loss = gain * (whole + bias).square().sum() ** 2
    expected = torch.autograd.grad(loss, [whole, bias, gain])

    local = slab(whole, partition, group)
    shared, plain = (bias.detach().clone().requires_grad_() for _ in range(2))
    own_gain = gain.detach().clone().requires_grad_()
    for used in (share(shared, group), plain):
        value = own_gain * add_up((local + used).square().sum(), group) ** 2
        value.backward()
    dist.all_reduce(plain.grad, group=group)
    errors = [
        slab_error(local.grad, 2 * expected[0], partition, group),
        *(float((b.grad - expected[1]).norm() / expected[1].norm()) for b in (shared, plain)),
        float((own_gain.grad - 2 * expected[2]) / expected[2]),
        float((value - loss) / loss),
    ]
    return max(map(abs, errors))


@pytest.mark.parametrize(("ranks", "shares"), CASES)
def test_gradients_of_what_all_ranks_share(pool, ranks, shares):
    """The convention: a loss is common; parameters on slabs are added up; what is computed from sums is whole already."""
    assert max(pool.run(ranks, layer, split(9, shares))) < 1e-12


def on_mesh(group):
    mesh = DeviceMesh.from_group(group, "cpu")
    partition = Partition((2, 3, 2))
    whole = random((1, 1, 7, 2, 2), 1, grad=False)
    return torch.equal(gather(scatter(whole, partition, mesh), partition, mesh), whole)


def test_a_mesh_is_a_group(pool):
    assert all(pool.run(3, on_mesh))
