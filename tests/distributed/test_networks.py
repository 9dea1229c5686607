"""patchreg's own networks on slabs: a training step is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks.comparison import limit, slab, slab_error, smooth
from torch import nn

from patchreg.distributed import Partition
from patchreg.distributed.convert import convert_sharded
from patchreg.distributed.layout import Layout
from patchreg.distributed.scope import Scope
from patchreg.errors import UnsupportedSharding
from patchreg.networks import KeypointAffine, TransMorph, TransMorphAffine, VoxelMorph
from patchreg.networks.elongation import elongate
from patchreg.networks.surroundings import surrounded
from patchreg.networks.swin import SwinSize


@dataclass(frozen=True)
class Network:
    """A network's options; all of its weights matter."""

    kind: Callable[..., nn.Module]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        network = self.kind(**self.options)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "flow.weight" in name or not parameter.any():
                    parameter.normal_(std=0.1)
        return network


def step(network: nn.Module, images: list[torch.Tensor], direction: torch.Tensor) -> list[torch.Tensor]:
    """The answer, and the gradients of the images and the parameters; random numbers are the same every time."""
    torch.manual_seed(7)
    out = network(*images)
    (out * direction).sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    return [out.detach(), *(x.grad for x in images), *grads]


def compared(group, network, shape, sizes, dim=2, dtype=torch.float64):
    """The largest error of the answer, of the images' gradients and of the parameters'."""
    partition = Partition(sizes, dim)
    images = [smooth((1, 1, *shape), seed) for seed in (1, 2)]
    direction = smooth((1, 3, *shape), 3, grad=False)
    expected = step(network.build().double(), images, direction)
    local = convert_sharded(network.build().to(dtype))
    parts = [slab(x.detach().to(dtype).requires_grad_(), partition, group) for x in images]
    with surrounded(Scope(Layout(partition), group)):
        found = step(local, parts, slab(direction.to(dtype), partition, group))
    errors = [slab_error(a, b, partition, group) for a, b in zip(found[:3], expected[:3], strict=True)]
    worst = 0.0
    floor = max(
        float(g.norm()) for g in expected[3:]
    )  # some gradients are zero but for rounding: of biases before a norm
    floor *= 1e-4 if dtype == torch.float64 else 1e-2
    for part, gradient in zip(found[3:], expected[3:], strict=True):
        total = part.double().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        worst = max(worst, float((total - gradient).norm()) / max(float(gradient.norm()), floor))
    return [*errors, worst]


SMALL = {"encoder": (4, 6, 6), "decoder": (6, 4), "final": (4,)}


def voxelmorph(**options):
    return Network(VoxelMorph, SMALL | options)


@pytest.mark.parametrize("memory", ["stored", "checkpoint"])
@pytest.mark.parametrize(
    ("network", "shape", "sizes", "dim"),
    [
        (voxelmorph(), (16, 9, 8), (8, 8), 2),
        (voxelmorph(norm=True), (17, 8, 9), (9, 8), 2),
        (voxelmorph(norm=True, decoder=(6,), integration_steps=4), (9, 18, 8), (12, 6), 3),
        (voxelmorph(decoder=(6,), final=(), kernel_size=5), (10, 9, 27), (9, 8, 10), 4),
        (voxelmorph(norm=True, integration_steps=3), (23, 7, 7), (8, 4, 11), 2),
        (voxelmorph(), (26, 8, 8), (7, 7, 6, 6), 2),  # the coarsest level is held whole
    ],
)
def test_voxelmorph(pool, network, shape, sizes, dim, memory):
    network.options["memory"] = memory
    found = pool.run(len(sizes), compared, network, shape, sizes, dim)
    assert max(map(max, found)) < limit(torch.float64)


def longer(**options):
    """With stacks before a block of the encoder, a step of the decoder, and the flow."""
    return elongate(VoxelMorph(**SMALL), 1, ["unet.down.1", "unet.up.0", "flow"], **options)


@pytest.mark.parametrize("memory", ["stored", "reversible"])
def test_a_network_made_longer(pool, memory):
    found = pool.run(2, compared, Network(longer, {"memory": memory}), (18, 8, 9), (9, 9))
    assert max(map(max, found)) < limit(torch.float64)


SHALLOW = {"encoder": (3, 4), "decoder": (4,), "final": (3,)}


@pytest.mark.parametrize(
    ("options", "shape", "sizes", "dim"),
    [
        ({}, (89, 6, 6), (45, 44), 2),
        ({"kernel_size": 5, "integration_steps": 2}, (99, 8, 8), (49, 50), 2),
        ({}, (80, 6, 41), (21, 20), 4),
    ],
)
def test_slabs_within_slabs(pool, options, shape, sizes, dim):
    network = Network(VoxelMorph, SHALLOW | options | {"memory": "checkpoint"})
    found = pool.run(len(sizes), compared, network, shape, sizes, dim)
    assert max(map(max, found)) < limit(torch.float64)


def transmorph(*depths, **options):
    size = SwinSize(6, depths or (2, 1), (1, 2, 3)[: len(depths or (2, 1))], drop_path=0.2)
    return Network(TransMorph, {"size": size, "window": (2, 3, 2)} | options)


@pytest.mark.parametrize("memory", ["stored", "checkpoint"])
@pytest.mark.parametrize(
    ("network", "shape", "sizes", "dim"),
    [
        (transmorph(2, 2, 1), (33, 16, 15), (18, 15), 2),
        (transmorph(reduction=2, integration_steps=2), (16, 38, 9), (12, 14, 12), 3),
        (transmorph(reversible=True), (16, 13, 30), (9, 12, 9), 4),
        (transmorph(), (40, 12, 8), (8, 12, 8, 12), 2),
    ],
)
def test_transmorph(pool, network, shape, sizes, dim, memory):
    network.options["memory"] = memory
    found = pool.run(len(sizes), compared, network, shape, sizes, dim)
    assert max(map(max, found)) < limit(torch.float64)


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
@pytest.mark.parametrize("network", [voxelmorph(norm=True, reversible=2), transmorph(reversible=True)])
def test_reversible_stacks(pool, network, memory):
    network.options["memory"] = memory
    found = pool.run(2, compared, network, (24, 12, 8), (11, 13))
    assert max(map(max, found)) < limit(torch.float64)


@pytest.mark.parametrize("network", [voxelmorph(norm=True, force_window=3), transmorph(force_window=5, reduction=4)])
def test_single_precision(pool, network):
    """The force is always of single precision."""
    found = pool.run(3, compared, network, (26, 13, 12), (9, 8, 9), 2, torch.float32)
    assert max(map(max, found)) < limit(torch.float32)


def mixed(group, network, shape, sizes):
    """The error of the answer under autocast, and of that of one process, both beside float64."""
    partition = Partition(sizes)
    images = [smooth((1, 1, *shape), seed, grad=False) for seed in (1, 2)]
    direction = smooth((1, 3, *shape), 3, torch.float32, grad=False)
    expected = network.build().double().eval()(*images)
    images = [x.float() for x in images]
    with torch.autocast("cpu", torch.bfloat16):
        plain = network.build().eval()(*images)
        local = convert_sharded(network.build().eval())
        with surrounded(Scope(Layout(partition), group)):
            found = local(*[slab(x, partition, group) for x in images])
    (found * slab(direction, partition, group)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in local.parameters())
    scale = float(expected.norm())
    ours = slab_error(found, expected, partition, group)
    return ours, float((plain.double() - expected).norm()) / scale


@pytest.mark.parametrize("memory", ["stored", "checkpoint"])
@pytest.mark.parametrize("network", [voxelmorph(norm=True), transmorph(window=(4, 3, 2))])
def test_autocast(pool, network, memory):
    """Half precision is exchanged, also by a rank that has no windows, and is no worse than in one process."""
    network.options["memory"] = memory
    for ours, theirs in pool.run(3, mixed, network, (28, 12, 8), (8, 8, 12)):
        assert ours < 2 * theirs


@pytest.mark.parametrize(
    "network",
    [
        voxelmorph(memory="checkpoint"),
        voxelmorph(norm=True),
        transmorph(2, 1, force_window=3),
        transmorph(reversible=True),
    ],
)
def test_outside_a_scope_nothing_has_changed(network):
    def run(made):
        kept = []
        images = [smooth((1, 1, 36, 16, 16), seed, torch.float32) for seed in (1, 2)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            out = made(*images)
        return out, kept

    torch.manual_seed(1)
    expected = run(network.build().eval())
    found = run(convert_sharded(network.build().eval()))
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


def refused(group, network):
    partition = Partition((16, 16))
    images = [slab(smooth((1, 1, 32, 16, 16), seed, torch.float32), partition, group) for seed in (1, 2)]
    try:
        with surrounded(Scope(Layout(partition), group)):
            convert_sharded(network.build())(*images)
    except UnsupportedSharding as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Network(KeypointAffine, {"encoder": (4, 4), "decoder": (4,), "keypoints": 4}), "KeypointAffine"),
        (Network(TransMorphAffine, {"size": SwinSize(4, (1,), (1,)), "window": (2, 2, 2)}), "TransMorphAffine"),
        (transmorph(bspline=3), "TransMorph"),
    ],
)
def test_networks_that_cannot_say_so(pool, network, says):
    assert all(says in text for text in pool.run(2, refused, network))
