"""Sharded layers beside the layers of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from ranks.comparison import limit, random
from torch import nn

from patchreg.distributed import Partition
from patchreg.distributed.convert import convert_sharded
from patchreg.distributed.layout import Layout
from patchreg.distributed.scope import Scope
from patchreg.networks.surroundings import surrounded

SPLITS = [(2, (6, 6), 2), (2, (4, 9), 4), (3, (5, 4, 6), 3), (4, (4, 4, 5, 3), 2), (4, (2, 1, 6, 4), 3)]
"""Ranks, planes of each, dimension."""


def kind(name, *args, **options):
    return name, args, options


CONVOLUTIONS = [
    kind("Conv3d", 4, 6, 3, padding=1),
    kind("Conv3d", 4, 6, 3, padding=1, bias=False, groups=2),
    kind("Conv3d", 4, 4, 1),
    kind("Conv3d", 4, 2, 5, padding=2),
    kind("Conv3d", 4, 2, 3, padding=2, dilation=2),
    kind("Conv3d", 4, 2, 5, padding=4, dilation=2),  # most slabs are thinner
    kind("Conv3d", 4, 2, (3, 5, 1), padding=(1, 2, 0), dilation=(1, 1, 3)),
    kind("Conv3d", 4, 2, 3),
    kind("Conv3d", 4, 2, 3, padding=3),
    kind("Conv3d", 4, 2, 3, stride=2, padding=1),
    kind("Conv3d", 4, 2, 3, stride=3),
    kind("Conv3d", 4, 2, (3, 2, 4), stride=(2, 1, 3), padding=(1, 0, 2), dilation=(1, 2, 1)),
    kind("Conv3d", 4, 2, 2, stride=2),
    kind("Conv3d", 4, 2, 1, stride=2),
    kind("Conv3d", 4, 2, 4, stride=2, padding=1),
    kind("Conv3d", 4, 2, 2, padding=1),
    kind("Conv3d", 4, 2, 3, padding="same"),
    kind("Conv3d", 4, 2, 4, padding="same"),
    kind("Conv3d", 4, 2, (2, 3, 4), padding="same", dilation=(3, 2, 1)),
    kind("Conv3d", 4, 2, 3, padding="valid"),
    kind("Conv3d", 4, 2, 3, padding=1, padding_mode="replicate"),
    kind("Conv3d", 4, 2, 5, padding=(3, 2, 3), stride=2, padding_mode="replicate"),
    kind("Conv3d", 4, 2, 4, padding="same", padding_mode="replicate"),
]
TRANSPOSED = [
    kind("ConvTranspose3d", 4, 2, 2, stride=2),
    kind("ConvTranspose3d", 4, 2, 4, stride=2, padding=1),
    kind("ConvTranspose3d", 4, 2, 3, stride=2, padding=1, output_padding=1),
    kind("ConvTranspose3d", 4, 2, 3, stride=1, padding=1, groups=2, bias=False),
    kind("ConvTranspose3d", 4, 2, (3, 2, 4), stride=(1, 3, 2), padding=(2, 0, 3), dilation=(2, 1, 2)),
    kind("ConvTranspose3d", 4, 2, 1, stride=3, output_padding=2),
    kind("ConvTranspose3d", 4, 2, 3, stride=2, dilation=3, output_padding=2),
]
POOLS = [
    kind("MaxPool3d", 2),
    kind("MaxPool3d", 3, stride=1, padding=1),
    kind("MaxPool3d", 3, stride=2, padding=1, ceil_mode=True),
    kind("MaxPool3d", 3, stride=2, dilation=2),
    kind("MaxPool3d", (2, 1, 3), stride=(1, 2, 3), padding=(1, 0, 1)),
    kind("AvgPool3d", 2),
    kind("AvgPool3d", 3, stride=1, padding=1),
    kind("AvgPool3d", 3, stride=2, padding=1, count_include_pad=False),
    kind("AvgPool3d", 3, stride=2, padding=1, ceil_mode=True),
    kind("AvgPool3d", 2, stride=3, ceil_mode=True, count_include_pad=False),
    kind("AvgPool3d", (2, 3, 4), stride=2, padding=(1, 1, 2), divisor_override=5),
]
INTERPOLATIONS = [
    kind("Upsample", scale_factor=2),
    kind("Upsample", scale_factor=(1.7, 0.6, 2.3)),
    kind("Upsample", size=(7, 17, 29)),
    kind("Upsample", scale_factor=2, mode="nearest-exact"),
    kind("Upsample", size=(29, 7, 17), mode="nearest-exact"),
    kind("Upsample", scale_factor=2, mode="trilinear"),
    kind("Upsample", scale_factor=2, mode="trilinear", align_corners=True),
    kind("Upsample", scale_factor=0.5, mode="trilinear"),
    kind("Upsample", scale_factor=(1.7, 0.6, 2.3), mode="trilinear"),
    kind("Upsample", scale_factor=(1.7, 0.6, 2.3), mode="trilinear", recompute_scale_factor=True),
    kind("Upsample", size=(7, 17, 29), mode="trilinear"),
    kind("Upsample", size=(29, 7, 17), mode="trilinear", align_corners=True),
]
NORMS = [
    kind("InstanceNorm3d", 4),
    kind("InstanceNorm3d", 4, affine=True, eps=0.01),
    kind("InstanceNorm3d", 4, affine=True, track_running_stats=True),
    kind("GroupNorm", 2, 4),
    kind("GroupNorm", 1, 4, affine=False),
    kind("GroupNorm", 4, 4, eps=0.1),
    kind("BatchNorm3d", 4),
    kind("BatchNorm3d", 4, affine=False, momentum=None),
    kind("BatchNorm3d", 4, track_running_stats=False),
]
CASES = {
    "convolutions": CONVOLUTIONS,
    "transposed": TRANSPOSED,
    "pools": POOLS,
    "interpolations": INTERPOLATIONS,
    "norms": NORMS,
}


def make(case):
    """A layer with parameters, and running statistics, of its own."""
    name, args, options = case
    torch.manual_seed(3)
    layer = getattr(nn, name)(*args, **options).double()
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.5, 1)
    return layer


def held(group, tensor, total, scope):
    """What a rank has of a tensor: its slab, or everything."""
    low, high = scope.span(total)
    return tensor.narrow(scope.dim, low, high - low)


def off(found, expected, whole):
    if found.shape != expected.shape:
        raise AssertionError(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    return float((found.detach().double() - expected.detach()).norm() / whole.norm().clamp(min=1e-12))


def added(tensor, group):
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor


def errors(group, case, x, scope, dtype, training=True):
    """Of the output, of the gradients and of the buffers of a layer, beside those of one process in float64."""
    total, ranks = x.shape[scope.dim], scope.layout.base.ranks
    layer = make(case).train(training)
    whole = x.detach().clone().requires_grad_()
    mine = convert_sharded(copy.deepcopy(layer).to(dtype))
    expected = layer(whole)
    direction = random(tuple(expected.shape), 5, grad=False)
    (expected * direction).sum().backward()

    if total != scope.layout.base.total:
        scope.learn({mine: (total,)}, {mine: ""})
        scope.parts.add(mine)
    own = held(group, x.detach(), total, scope).to(dtype).clone().requires_grad_()
    with surrounded(scope):
        out = mine(own)
    out_total = expected.shape[scope.dim]
    here = held(group, direction, out_total, scope).to(dtype)
    parts = 1 if scope.layout.of(out_total) else ranks  # of what all hold each has a part of the gradient
    (out * here).sum().div(parts).backward()
    grad = own.grad if scope.layout.of(total) else added(own.grad, group)
    found = [
        off(out, held(group, expected.detach(), out_total, scope), expected.detach()),
        off(grad, held(group, whole.grad, total, scope), whole.grad),
    ]
    found += [
        off(added(p.grad, group), q.grad, q.grad) for p, q in zip(mine.parameters(), layer.parameters(), strict=True)
    ]
    return found + [
        off(p.double(), q.double(), q.double()) for p, q in zip(mine.buffers(), layer.buffers(), strict=True)
    ]


def compare(group, cases, sizes, dim, dtype, total=None, training=True):
    """The largest error of every case; of tensors with ``total`` planes in a network whose input is split as ``sizes`` say."""
    found = {}
    for case in cases:
        scope = Scope(Layout(Partition(sizes, dim)), group)
        shape = [2, 4, 7, 9, 8]
        shape[dim] = total or sum(sizes)
        offset = (
            1.2 if case[0] == "MaxPool3d" else 0.3
        )  # for a maximum all negative: nothing beyond the volume is larger
        x = random(tuple(shape), 1, grad=False) - offset
        found[str(case)] = max(errors(group, case, x, scope, dtype, training))
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("ranks", "sizes", "dim"), SPLITS)
def test_slabs(pool, name, ranks, sizes, dim):
    for dtype in (torch.float64, torch.float32) if ranks == 3 else (torch.float64,):
        for found in pool.run(ranks, compare, CASES[name], sizes, dim, dtype):
            assert not {case: error for case, error in found.items() if not error < limit(dtype)}


@pytest.mark.parametrize("name", CASES)
def test_levels_that_all_ranks_hold(pool, name):
    """Of 5 planes over 3 ranks; some of the layers make more of them, which are split."""
    for found in pool.run(3, compare, CASES[name], (8, 8, 8), 2, torch.float64, 5):
        assert not {case: error for case, error in found.items() if not error < limit(torch.float64)}


def test_norms_after_training(pool):
    for found in pool.run(2, compare, NORMS, (4, 7), 3, torch.float64, None, False):
        assert not {case: error for case, error in found.items() if not error < limit(torch.float64)}


def precision(group):
    """Errors in single precision for values far from zero: of slabs, and of one process."""
    scope, found = Scope(Layout(Partition((6, 4), 2)), group), []
    whole = 1000 + random((2, 4, 10, 9, 8), 1, grad=False)
    for case in NORMS[:2]:
        layer = make(case)
        expected = layer(whole)
        alone = copy.deepcopy(layer).float()(whole.float())
        with surrounded(scope):
            out = convert_sharded(copy.deepcopy(layer)).float()(held(group, whole, 10, scope).float())
        found.append((off(out, held(group, expected, 10, scope), expected), off(alone, expected, expected)))
    return found


def test_norms_are_as_precise_as_those_of_one_process(pool):
    for found in pool.run(2, precision):
        for slabs, alone in found:
            assert slabs < 1.5 * alone
