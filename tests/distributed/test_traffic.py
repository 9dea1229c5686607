from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks.comparison import CASES, random, slab, split

from patchreg import distributed
from patchreg.distributed import Partition, Traffic, counting, halo_widths, traffic
from patchreg.distributed.exchange import Plan
from patchreg.distributed.ring import Ring
from patchreg.losses import LabelSet

TURN = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.float64)


def halos(group, partition):
    rank, ranks = dist.get_rank(group), partition.ranks
    local = slab(random((2, 3, partition.total, 5, 4), 1, torch.float32), partition, group)
    plane = 2 * 3 * 5 * 4 * 4
    found = []
    with counting() as sent:
        distributed.exchange_halo(local, partition, (2, 1), group).sum().backward()
    found.append((sent, traffic.halo(partition, (2, 1), rank, plane)))
    for window in ((3, 1, 1, 1), (3, 2, 1, 1), (5, 1, 4, 2), (2, 2, 0, 1)):
        with counting() as sent:
            distributed.exchange_halo(
                local, partition, halo_widths(partition, *window), group, check=False
            ).sum().backward()
        found.append((sent, traffic.conv(partition, rank, plane, *window)))
    I, J = (slab(random((2, 1, partition.total, 5, 4), n, torch.float32, n == 2), partition, group) for n in (1, 2))
    mask = torch.ones_like(I[:1])
    with counting() as sent:
        distributed.lncc(I, J, partition, 5, group=group).backward()
        distributed.lncc(I, J, partition, 3, mask=mask, group=group).backward()
    expected = traffic.lncc(partition, rank, 2 * 20 * 4, 5) + traffic.lncc(partition, rank, 2 * 20 * 4, 3, 1, 20)
    found.append((sent, expected))
    with counting() as sent:
        distributed.diffusion(local, partition, (1.0, 1, 1), group).backward()
        distributed.bending_energy(local, partition, (1.0, 1, 1), group=group)
    expected = traffic.regularity(partition, rank, plane, 1) + traffic.regularity(partition, rank, plane, 2)
    found.append((sent, expected))
    with counting() as sent:
        distributed.mse(I, J, partition, group=group).backward()
        distributed.mse(I, J, partition, mask, group=group).backward()
        distributed.mutual_information(I, J, partition, 16, mask, group=group).backward()
    expected = traffic.mse(ranks) + traffic.mse(ranks, True) + traffic.mutual_information(ranks, 16, 2, True, 1)
    found.append((sent, expected))
    return found


@pytest.mark.parametrize(("ranks", "shares"), CASES)
def test_halos_and_losses(pool, ranks, shares):
    for found in pool.run(ranks, halos, split(12, shares)):
        for sent, expected in found:
            assert sent == expected


def sampler(group, partition):
    rank, ranks = dist.get_rank(group), partition.ranks
    image = slab(random((1, 2, partition.total, 12, 4), 1, torch.float32), partition, group)
    still = slab(torch.zeros(1, 3, partition.total, 12, 4, requires_grad=True), partition, group)
    affine = TURN.clone().requires_grad_()
    plane = 2 * 12 * 4 * 4
    found = []
    around = Plan(
        partition, tuple((max(a - 1, 0), min(b + 1, partition.total)) if a < b else (0, 0) for a, b in partition.spans)
    )
    with counting() as sent:
        distributed.warp(image, partition, still, group=group).sum().backward()
    found.append((sent, traffic.warp(around, rank, plane, image_gradient=True)))
    every = Plan(partition, tuple((0, partition.total) if a < b else (0, 0) for a, b in partition.spans))
    for method, ring in (("exchange", None), ("ring", Ring(partition))):
        with counting() as sent:
            distributed.warp(image, partition, still, affine, group=group, method=method).sum().backward()
        found.append((sent, traffic.warp(every, rank, plane, ring, image_gradient=True, common=12)))
        with counting() as sent:
            distributed.warp(image, partition, still.detach(), TURN, group=group, method=method).sum().backward()
        found.append((sent, traffic.warp(every, rank, plane, ring, image_gradient=True, position_gradient=False)))
    labels = torch.zeros(1, 1, partition.sizes[rank], 12, 4, dtype=torch.int16)
    with counting() as sent:
        distributed.soft_dice(labels, labels, LabelSet([1, 2, 3]), partition, still, affine, group=group).backward()
    found.append((sent, traffic.soft_dice(every, rank, 12 * 4 * 2, 3, affine_gradient=True)))
    return found, ranks


@pytest.mark.parametrize(("ranks", "shares"), CASES)
def test_the_sampler(pool, ranks, shares):
    for found, _ in pool.run(ranks, sampler, split(12, shares)):
        for sent, expected in found:
            assert sent == expected


def test_formulas_by_hand():
    """Four slabs of 8 planes of 100 bytes."""
    p = Partition((8,) * 4)
    assert traffic.conv(p, 0, 100, 3, 1, 1) == Traffic(200, 2, 0)  # a plane there, a gradient back
    assert traffic.conv(p, 1, 100, 3, 1, 1) == Traffic(400, 4, 0)
    assert traffic.conv(p, 1, 100, 2, 2) == Traffic()
    assert traffic.conv(p, 1, 100, 3, 2, 1) == Traffic(200, 2, 0)  # only from the left
    assert traffic.lncc(p, 1, 100, 9).point_to_point == 2 * 800 + 800
    assert Ring(p).traffic(1, 100) == Traffic(
        3000 + 300, 3 + 2
    )  # slabs of 10, 11, 11 and 9 planes; own planes to neighbours
    assert traffic.mutual_information(4, 32, measured=False).collective == 3 * 32 + 2 * 3 * 8 * 1024 // 4


def nested(group):
    partition = Partition((4, 4))
    local = torch.ones(1, 1, 4, 2, 2)
    with counting() as outer:
        distributed.exchange_halo(local, partition, (1, 1), group, check=False)
        with counting() as inner:
            distributed.exchange_halo(local, partition, (1, 1), group, check=False)
    F.relu(local)
    distributed.exchange_halo(local, partition, (1, 1), group)
    return outer.point_to_point, inner.point_to_point


def test_counting_may_be_nested(pool):
    assert pool.run(2, nested) == [(32, 16)] * 2
