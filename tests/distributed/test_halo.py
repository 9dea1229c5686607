from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks.comparison import CASES, limit, random, slab, slab_error, split

from patchreg.distributed import Partition, exchange_halo, halo_widths, share, start_halo

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def padded(volume, dim, by, outside):
    if outside == "border":
        first, last = volume.narrow(dim, 0, 1), volume.narrow(dim, volume.shape[dim] - 1, 1)
        return torch.cat([first] * by + [volume] + [last] * by, dim=dim)
    padding = [0] * 6
    padding[2 * (4 - dim)] = padding[2 * (4 - dim) + 1] = by
    return F.pad(volume, padding)


def extend(group, partition, widths, outside, dtype, pieces):
    """Errors of an extended slab and of its gradient, for slabs that lie in memory in several ways."""
    dim, rank = partition.dim, dist.get_rank(group)
    shape = [2, 3, 4, 5, 6]
    shape[dim] = partition.total
    whole = random(tuple(shape), 1, dtype)
    left, right = widths if isinstance(widths[0], int) else widths[rank]
    start, stop = partition.bounds(rank)
    low, high = start - left, stop + right
    if start == stop and isinstance(widths[0], int):
        low, high = start, stop
    if outside == "nothing":
        low, high = max(low, 0), min(high, partition.total)
    by = 20
    expected = padded(whole, dim, by, outside).narrow(dim, by + low, high - low)
    weights = [random((*shape[:dim], 40, *shape[dim + 1 :]), 2 + r, dtype, False) for r in range(partition.ranks)]

    def total(r, extended):
        return (extended * weights[r].narrow(dim, 0, extended.shape[dim])).sum()

    parts = []
    for r, (a, b) in enumerate(partition.spans):
        x, y = widths if isinstance(widths[0], int) else widths[r]
        x, y = (0, 0) if a == b and isinstance(widths[0], int) else (x, y)
        first, end = (max(a - x, 0), min(b + y, partition.total)) if outside == "nothing" else (a - x, b + y)
        parts.append(total(r, padded(whole, dim, by, outside).narrow(dim, by + first, end - first)))
    (grad,) = torch.autograd.grad(torch.stack(parts).sum(), whole)

    local = slab(whole, partition, group)
    leaf = local
    if pieces == "strided":
        local = local.transpose(3, 4).contiguous().transpose(3, 4)
    elif pieces == "channels_last":
        local = local.contiguous(memory_format=torch.channels_last_3d)
    if pieces == "later":
        flight = start_halo(local, partition, widths, group, outside)
        extended = flight.wait()
    else:
        extended = exchange_halo(local, partition, widths, group, outside)
    assert torch.equal(extended, expected)
    total(rank, extended).backward()
    return slab_error(leaf.grad, grad, partition, group)


@pytest.mark.parametrize("outside", ["zeros", "border", "nothing"])
@pytest.mark.parametrize(("ranks", "shares"), CASES)
def test_extended_slabs_and_their_gradients(pool, ranks, shares, outside):
    for dim in (2, 3, 4):
        for widths in ((1, 1), (0, 2), (3, 0), (7, 9)):  # the last reach several ranks far, and beyond the volume
            found = pool.run(ranks, extend, split(10, shares, dim), widths, outside, torch.float64, "plain")
            assert max(found) < 1e-14, (dim, widths)


@pytest.mark.parametrize("pieces", ["plain", "strided", "channels_last", "later"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_memory_and_precision(pool, dtype, pieces):
    found = pool.run(3, extend, Partition((3, 5, 2)), (2, 1), "zeros", dtype, pieces)
    assert max(found) < 20 * torch.finfo(dtype).eps


def test_every_rank_its_own_widths(pool):
    found = pool.run(3, extend, Partition((3, 5, 2)), ((0, 1), (-1, 2), (3, -2)), "zeros", torch.float64, "plain")
    assert max(found) < 1e-14


def network(group, partition, dtype):
    """Three convolutions of different stride and dilation and a pooling, weights shared: output and all gradients."""
    dim = partition.dim
    shape = [2, 2, 7, 6, 8]
    shape[dim] = partition.total
    whole = random(tuple(shape), 1)
    layers = [(3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2), (5, 1, 2, 1)]
    weights = [random((2, 2, k, k, k), 10 + n) for n, (k, *_) in enumerate(layers)]

    x = whole
    for w, (_, stride, padding, dilation) in zip(weights, layers, strict=True):
        x = F.conv3d(x, w, None, stride, padding, dilation).tanh()
    pooled = F.avg_pool3d(x, 2)
    direction = random(tuple(pooled.shape), 5, grad=False)
    expected = torch.autograd.grad((pooled * direction).sum(), [whole, *weights])

    local = slab(whole.to(dtype), partition, group)
    here = partition
    own_weights = [w.detach().to(dtype).requires_grad_() for w in weights]
    y = local
    for w, window in zip(own_weights, layers, strict=True):
        kernel, stride, padding, dilation = window
        y = exchange_halo(y, here, halo_widths(here, *window), group, check=False)
        paddings = [0 if d == dim else padding for d in (2, 3, 4)]
        here = here.after_conv(*window)
        if y.shape[dim]:
            y = F.conv3d(y, share(w, group), None, stride, paddings, dilation).tanh()
        else:  # no outputs: the same shape, connected to the same things
            sizes = [2, 2, *((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in y.shape[2:])]
            sizes[dim] = 0
            y = y.reshape(sizes) + share(w, group).sum()
    y = exchange_halo(y, here, halo_widths(here, 2, 2), group, check=False)
    here = here.after_conv(2, 2)
    y = F.avg_pool3d(y, 2) if y.shape[dim] else y.reshape([n if d < 2 else n // 2 for d, n in enumerate(y.shape)])
    value = slab_error(y, pooled, here, group)
    (y * here.cut(direction.to(dtype), dist.get_rank(group))).sum().backward()
    errors = [value, slab_error(local.grad, expected[0], partition, group)]
    return errors + [float((w.grad - e).norm() / e.norm()) for w, e in zip(own_weights, expected[1:], strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("ranks", "shares"), CASES)
def test_a_network_equals_one_process(pool, ranks, shares, dtype):
    for dim in (2, 4):
        found = pool.run(ranks, network, split(20, shares, dim), dtype)
        assert max(map(max, found)) < limit(dtype), dim


def interior_first(group):
    """The inside of a slab is computed while its halo flies."""
    partition = Partition((4, 6, 5))
    whole, weight = random((1, 1, 15, 4, 4), 1), random((1, 1, 3, 3, 3), 2, grad=False)
    local = slab(whole, partition, group)
    flight = start_halo(local, partition, (1, 1), group)
    inside = F.conv3d(local, weight, padding=(0, 1, 1))
    extended = flight.wait()
    ends = [F.conv3d(extended.narrow(2, at, 3), weight, padding=(0, 1, 1)) for at in (0, extended.shape[2] - 3)]
    out = torch.cat([ends[0], inside, ends[1]], dim=2)
    expected = F.conv3d(whole, weight, padding=1)
    value = slab_error(out, expected, partition, group)
    out.square().sum().backward()
    (grad,) = torch.autograd.grad(expected.square().sum(), whole)
    return value, slab_error(local.grad, grad, partition, group)


def test_interior_while_the_halo_flies(pool):
    assert max(map(max, pool.run(3, interior_first))) < 1e-12
