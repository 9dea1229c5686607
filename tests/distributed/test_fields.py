from __future__ import annotations

import pytest
import torch
from ranks.comparison import CASES, limit, random, slab, slab_error, smooth, split

from patchreg import ops
from patchreg.distributed import Partition
from patchreg.distributed.fields import compose, integrate, lncc_force
from patchreg.errors import InputError
from patchreg.memory import LivePeak
from patchreg.networks.force import lncc_force as whole_force

SOME = [(*case, torch.float64) for case in CASES[1::2]] + [(*CASES[0], torch.float32)]


def field(partition, seed, size, dtype):
    shape = [2, 3, 7, 6, 8]
    shape[partition.dim] = partition.total
    return (size * (smooth(tuple(shape), seed, grad=False) - 0.5)).to(dtype).requires_grad_()


def composed(group, partition, dtype, padding):
    u, v = field(partition, 1, 3, torch.float64), field(partition, 2, 9, torch.float64)
    direction = random(tuple(u.shape), 3, grad=False)
    expected = ops.compose(u, v, padding=padding)
    grads = torch.autograd.grad((expected * direction).sum(), [u, v])
    a, b = (slab(x.detach().to(dtype).requires_grad_(), partition, group) for x in (u, v))
    found = compose(a, b, partition, group=group, padding=padding)
    (found * slab(direction.to(dtype), partition, group)).sum().backward()
    pairs = [(found, expected), *zip((a.grad, b.grad), grads, strict=True)]
    return [slab_error(x, y, partition, group) for x, y in pairs]


def integrated(group, partition, dtype, padding, memory, steps, size):
    velocity = field(partition, 1, size, torch.float64)
    direction = random(tuple(velocity.shape), 3, grad=False)
    expected = ops.integrate(velocity, steps, padding)
    (grad,) = torch.autograd.grad((expected * direction).sum(), velocity)
    local = slab(velocity.detach().to(dtype).requires_grad_(), partition, group)
    found = integrate(local, partition, steps, padding, memory, group)
    (found * slab(direction.to(dtype), partition, group)).sum().backward()
    return [slab_error(found, expected, partition, group), slab_error(local.grad, grad, partition, group)]


@pytest.mark.parametrize(("ranks", "shares", "dtype"), SOME)
def test_a_composition_equals_one_process(pool, ranks, shares, dtype):
    for dim, padding in ((2, "border"), (4, "zeros")):
        found = pool.run(ranks, composed, split(13, shares, dim), dtype, padding)
        assert max(map(max, found)) < limit(dtype), (dim, padding)


@pytest.mark.parametrize(("ranks", "shares", "dtype"), SOME)
def test_an_integration_equals_one_process(pool, ranks, shares, dtype):
    for dim, padding, memory, steps, size in ((3, "border", "recompute", 7, 6), (2, "zeros", "stored", 3, 30)):
        found = pool.run(ranks, integrated, split(13, shares, dim), dtype, padding, memory, steps, size)
        assert max(map(max, found)) < limit(dtype), (dim, padding, memory)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_any_number_of_steps(pool, steps):
    for memory in ("recompute", "stored"):
        found = pool.run(2, integrated, Partition((5, 4)), torch.float64, "border", memory, steps, 8)
        assert max(map(max, found)) < 1e-10, memory


def kept(group, memory, steps):
    """Bytes that an integration keeps for the backward pass, and the peak of both, in slabs."""
    partition = Partition((16, 16))
    local = slab(field(partition, 1, 2, torch.float32), partition, group)
    with LivePeak() as counted:
        out = integrate(local, partition, steps, memory=memory, group=group)
        between = counted.live
        out.sum().backward()
    return between / local.nbytes, counted.peak / local.nbytes


def test_what_an_integration_keeps(pool):
    (between, peak), _ = pool.run(2, kept, "recompute", 7)
    assert between < 1.1  # the result
    assert peak < 10
    (between, _), _ = pool.run(2, kept, "stored", 7)
    assert 6.9 < between < 7.1


def forced(group, partition, window):
    shape = [2, 2, 7, 6, 8]
    shape[partition.dim] = partition.total
    fixed, moving = (smooth(tuple(shape), seed, torch.float32, grad=False) for seed in (1, 2))
    parts = [slab(x, partition, group) for x in (fixed, moving)]
    return slab_error(
        lncc_force(*parts, window, partition, group), whole_force(fixed, moving, window), partition, group
    )


@pytest.mark.parametrize(("ranks", "shares"), CASES)
def test_the_force_equals_one_process(pool, ranks, shares):
    for dim, window in ((2, 5), (4, 3), (3, 1)):
        assert max(pool.run(ranks, forced, split(12, shares, dim), window)) < limit(torch.float32), (dim, window)


def blank(group):
    return float(lncc_force(*torch.zeros(2, 1, 1, 4, 5, 6).unbind(), 3, Partition((4, 4)), group).abs().max())


def test_images_that_carry_nothing(pool):
    assert pool.run(2, blank) == [0, 0]


def mistaken(group, change):
    arguments = {"velocity": torch.zeros(1, 3, 4, 5, 6), "partition": Partition((4, 4)), "group": group} | change
    with pytest.raises(InputError) as caught:
        integrate(**arguments)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": -1}, "steps must not be negative, got -1"),
        ({"padding": "wrap"}, "padding must be one of"),
        ({"velocity": torch.zeros(1, 2, 4, 5, 6)}, "three components"),
        ({"partition": Partition((5, 4))}, "5 planes along dim 2"),
    ],
)
def test_mistakes(pool, change, says):
    assert says in pool.run(2, mistaken, change)[0]
