"""The layers of a Swin transformer on slabs of tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks.comparison import error, limit, random

from patchreg.distributed import Partition
from patchreg.distributed.layers import register_all
from patchreg.distributed.layers.base import RULES
from patchreg.distributed.layers.tokens import shared_windows
from patchreg.distributed.layout import Layout
from patchreg.distributed.scope import Scope
from patchreg.networks.attention import WindowAttention
from patchreg.networks.surroundings import surrounded
from patchreg.networks.swin import PatchMerging


def compared(group, layer, grid, sizes, dim, dtype=torch.float64):
    """Errors of a token layer on slabs: its answer, the gradient of the tokens, and those of its parameters.

    Args:
        grid: of the tokens.
        sizes: planes of a volume that the ranks hold, of which the tokens' follow.
        dim: that is split, of images.
    """
    torch.manual_seed(0)
    layer = layer().double()
    whole = random((2, *grid, 3 if isinstance(layer, PatchMerging) else 8), 1)
    expected = layer(whole)
    direction = random(tuple(expected.shape), 2, grad=False)
    grads = torch.autograd.grad((expected * direction).sum(), [whole, *layer.parameters()])

    scope = Scope(Layout(Partition(sizes, dim)), group)
    total = grid[dim - 2]
    register_all()
    layer.to(dtype).__class__ = RULES[type(layer)]
    scope.totals[layer] = (total,)
    x = scope.part(whole.detach().to(dtype), dim - 1).clone().requires_grad_()
    with surrounded(scope):
        found = layer(x)
    out_total = expected.shape[dim - 1]
    value = error(found, scope.part(expected, dim - 1))
    loss = (found * scope.part(direction.to(dtype), dim - 1)).sum()
    if scope.layout.of(out_total) is None:  # every rank has its own part of the gradient
        loss = loss / scope.layout.base.ranks
    found = torch.autograd.grad(loss, [x, *layer.parameters()])
    parts = [g.double().clone(memory_format=torch.contiguous_format) for g in found]
    for index, part in enumerate(parts):
        if index or scope.layout.of(total) is None:
            dist.all_reduce(part, group=group)
    return [value, error(parts[0], scope.part(grads[0], dim - 1)), *map(error, parts[1:], grads[1:])]


class Attention:
    """Can be pickled, with its options."""

    def __init__(self, window, shifted):
        self.window, self.shifted = window, shifted

    def __call__(self):
        return WindowAttention(8, 2, self.window, self.shifted)


def merging():
    return PatchMerging(3)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("sizes", "dim", "grid", "window"),
    [
        ((8, 8), 2, (8, 4, 6), (4, 2, 3)),  # windows lie within slabs
        ((9, 7), 2, (7, 5, 4), (3, 2, 4)),  # padded along two axes, one window along the third
        ((9, 7), 3, (3, 9, 4), (2, 5, 3)),
        ((4, 12), 4, (4, 2, 11), (3, 2, 4)),
        ((6, 5, 5), 4, (2, 3, 13), (2, 2, 3)),
        ((5, 5, 5), 2, (7, 3, 4), (5, 2, 3)),  # fewer windows than ranks
        ((5, 5, 5), 3, (3, 8, 4), (2, 9, 3)),  # one window along the split axis
        ((8, 8, 8, 8), 2, (9, 3, 3), (2, 3, 2)),
        ((8, 8, 8, 8), 2, (7, 3, 3), (2, 3, 2)),  # held whole
    ],
)
def test_window_attention_equals_one_process(pool, sizes, dim, grid, window, shifted):
    found = pool.run(len(sizes), compared, Attention(window, shifted), grid, sizes, dim)
    assert max(map(max, found)) < limit(torch.float64)


def test_window_attention_in_single_precision(pool):
    found = pool.run(3, compared, Attention((3, 2, 4), True), (13, 5, 6), (5, 4, 4), 2, torch.float32)
    assert max(map(max, found)) < limit(torch.float32)


@pytest.mark.parametrize(
    ("sizes", "dim", "grid"),
    [
        ((8, 8), 2, (8, 4, 6)),
        ((9, 7), 3, (5, 9, 4)),
        ((6, 5, 5), 4, (2, 3, 13)),
        ((6, 5, 5), 2, (9, 3, 2)),  # split before, whole after
        ((6, 5, 5), 2, (5, 3, 2)),  # whole before, too
    ],
)
def test_patch_merging_equals_one_process(pool, sizes, dim, grid):
    found = pool.run(len(sizes), compared, merging, grid, sizes, dim)
    assert max(map(max, found)) < limit(torch.float64)


def test_every_window_is_on_one_rank():
    for size, total in itertools.product((1, 2, 3, 5), (4, 7, 12)):
        for shift in range(size):
            spans = [(0, 1), (1, total // 2 + 1), (total // 2 + 1, total)]
            shares = shared_windows(spans, size, shift)
            assert shares[0][0] <= 0
            assert shares[-1][1] >= total > shares[-1][1] - size
            assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
            assert all((low - shift) % size == 0 for low, _ in shares)
