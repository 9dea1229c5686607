from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from ranks.rank_pool import RankError, RankPool
from ranks.stray import nothing, stray

from patchreg import distributed
from patchreg.distributed import Partition
from patchreg.errors import InputError, NoGradient, PatchregError

P = Partition((4, 3))


def slab(rank, channels=1, dtype=torch.float32):
    return torch.rand(1, channels, P.sizes[rank], 6, 5).to(dtype)


MISTAKES = {
    "a slab that is not the partition's": lambda r, g: distributed.lncc(slab(0), slab(0), P, 3, group=g),
    "one rank's slab is wrong": lambda r, g: distributed.exchange_halo(slab(r)[:, :, : 3 + (r == 1)], P, (1, 1), g),
    "a partition for other ranks": lambda r, g: distributed.gather(slab(r), Partition((4, 3, 1)), g),
    "different partitions": lambda r, g: distributed.exchange_halo(
        slab(r), Partition((4, 3)) if r == 0 else Partition((5, 3)), (1, 1), g
    ),
    "different channels": lambda r, g: distributed.exchange_halo(slab(r, 1 + r), P, (1, 1), g),
    "different dtypes": lambda r, g: distributed.mse(*[slab(r, 1, (torch.float32, torch.float64)[r])] * 2, P, group=g),
    "a gradient on one rank": lambda r, g: distributed.exchange_halo(slab(r).requires_grad_(r == 0), P, (1, 1), g),
    "different options": lambda r, g: distributed.lncc(slab(r), slab(r), P, 3 + 2 * r, group=g),
    "different functions": lambda r, g: (distributed.warp if r else distributed.gather)(slab(r), P, group=g),
    "widths": lambda r, g: distributed.exchange_halo(slab(r), P, (-3, -3), g),
    "widths of too few": lambda r, g: distributed.exchange_halo(slab(r), P, [(1, 1)], g),
    "outside": lambda r, g: distributed.exchange_halo(slab(r), P, (1, 1), g, "wrap"),
    "nothing but border": lambda r, g: distributed.exchange_halo(slab(r), P, [(0, 0), (-5, 4)], g, "border"),
    "an operation's own": lambda r, g: distributed.lncc(slab(r), slab(r), P, 4, group=g),
    "shapes": lambda r, g: distributed.mse(slab(r), slab(r, 2), P, group=g),
    "a mask": lambda r, g: distributed.lncc(slab(r), slab(r), P, 3, mask=slab(r, 2), group=g),
    "components": lambda r, g: distributed.diffusion(slab(r), P, (1.0, 1, 1), g),
    "spacing": lambda r, g: distributed.diffusion(slab(r, 3), P, (1.0, 0, 1), g),
    "a displacement": lambda r, g: distributed.warp(slab(r), P, slab(r, 2), group=g),
    "a method": lambda r, g: distributed.warp(slab(r), P, slab(r, 3), group=g, method="star"),
    "no gradient": lambda r, g: distributed.warp(slab(r), P, slab(r, 3).requires_grad_(), group=g, mode="nearest"),
    "another dimension": lambda r, g: distributed.warp(slab(r), P, slab(r, 3), output=Partition((4, 3), 3), group=g),
    "not a group": lambda r, g: distributed.gather(slab(r), P, "everybody"),
}

SAYS = {
    "a slab that is not the partition's": "must be rank 1's slab, with 3 planes along dim 2",
    "one rank's slab is wrong": "must be rank 0's slab, with 4 planes",
    "a partition for other ranks": "for 3 ranks, the group has 2",
    "different partitions": r"sizes=\(4, 3\), dim=2\) on rank 0 and .*\(5, 3\), dim=2\) on rank 1",
    "different channels": r"local is torch.float32 \[1, 1, 'split', 6, 5\] .* and torch.float32 \[1, 2, 'split', 6, 5\] .* on rank 1",
    "different dtypes": "fixed is torch.float32 .* and torch.float64",
    "a gradient on one rank": "with gradient on rank 0 and .* no gradient on rank 1",
    "different options": "window is 3 on rank 0 and 5 on rank 1",
    "different functions": "operation is gather on rank 0 and warp on rank 1",
    "widths": "cut more planes off than rank 0 has",
    "widths of too few": "or that of each of 2 ranks",
    "outside": "outside must be one of",
    "nothing but border": "nothing but border values",
    "an operation's own": "window must be odd",
    "shapes": "fixed and moving must have one shape",
    "a mask": r"mask must have shape \(1, 1, ",
    "components": "displacement must have shape",
    "spacing": "spacing must be three positive",
    "a displacement": "displacement must have shape",
    "a method": "method must be one of",
    "no gradient": "use mode='linear'",
    "another dimension": "both must be split alike",
    "not a group": "is not in the group",
}


def make(group, name):
    """What both ranks are told; nobody hangs, and the group works as before."""
    try:
        MISTAKES[name](dist.get_rank(group), group)
    except PatchregError as problem:
        message = f"{type(problem).__name__}: {problem}"
    else:
        message = "nothing"
    assert distributed.gather(slab(dist.get_rank(group)), P, group).shape[2] == 7
    return message


@pytest.mark.parametrize("name", MISTAKES)
def test_all_ranks_hear_of_a_mistake(pool, name):
    messages = pool.run(2, make, name)
    assert all(message.startswith(("InputError", "NoGradient")) for message in messages), messages
    assert any(re.search(SAYS[name], message) for message in messages), messages
    for message in messages:
        assert re.search(SAYS[name], message) or "raised an error in the same call" in message, messages


def unknown_error(group):
    """Also errors that are not ours reach the others."""
    with pytest.raises((TypeError, InputError)):
        distributed.warp(
            slab(dist.get_rank(group)),
            P,
            slab(dist.get_rank(group), 3),
            shape="x" if dist.get_rank(group) else None,
            group=group,
        )
    return True


def test_any_error_reaches_all(pool):
    assert all(pool.run(2, unknown_error))


def second_derivative(group):
    local = slab(dist.get_rank(group)).requires_grad_()
    (grad,) = torch.autograd.grad(
        distributed.exchange_halo(local, P, (1, 1), group).square().sum(), local, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    return True


def test_second_derivatives_are_refused(pool):
    assert all(pool.run(2, second_derivative))


def test_without_processes():
    with pytest.raises(InputError, match="torchrun"):
        distributed.gather(torch.zeros(1, 1, 4, 2, 2), Partition((4,)))
    assert issubclass(NoGradient, PatchregError)


def test_ranks_that_hang_are_shown():
    """Of the tests' own processes: a deadlock fails with every rank's stack, and the next program runs."""
    pool = RankPool({1: (0,), 2: (0, 1)})
    try:
        with pytest.raises(RankError, match=r"(?s)rank 0 .* hangs.*barrier.*rank 1 .* hangs.*stray"):
            pool.run(2, stray, timeout=3)
        assert pool.run(1, nothing) == [None]
    finally:
        pool.stop()
