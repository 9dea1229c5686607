from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from patchreg.errors import InputError
from patchreg.networks import KeypointAffine, VoxelMorph
from patchreg.networks.elongation import Elongated, elongate

BEFORE = ["unet.down.1", "unet.final.0.conv", "flow"]


def small() -> VoxelMorph:
    torch.manual_seed(0)
    network = VoxelMorph((4, 8, 8), (8, 8), (8,), norm=True)
    nn.init.normal_(network.flow.weight, std=0.1)
    return network


def moved_from_the_start(network: nn.Module) -> nn.Module:
    """The stacks' convolutions are zero at first; here they are not."""
    torch.manual_seed(1)
    for name, p in network.named_parameters():
        if "elongation" in name:
            nn.init.normal_(p, std=0.2)
    return network


@pytest.fixture
def images(generator):
    return [torch.rand((2, 1, 12, 8, 16), generator=generator) for _ in range(2)]


@pytest.mark.parametrize("memory", ["stored", "checkpoint", "reversible"])
def test_gives_exactly_what_the_network_gave(memory, images):
    network = small()
    expected = network(*images)
    longer = elongate(network, 3, BEFORE, memory)
    assert longer is network
    assert torch.equal(longer(*images), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(longer(*images), small()(*images))


def test_before_a_step_of_the_decoder(images, tolerances):
    """The stack sees features of both resolutions in one tensor, which the shorter network need not make."""
    expected = small()(*images)
    for name in ("unet.up.0", "unet.up.0.conv"):
        found = elongate(small(), 2, [name])(*images)
        assert (found - expected).norm() < tolerances.value_float32 * expected.norm()


def test_policies_agree(images):
    results = []
    for memory in ("stored", "checkpoint", "reversible"):
        network = moved_from_the_start(elongate(small(), 2, [*BEFORE, "unet.up.0"], memory)).double()
        network(*(x.double() for x in images)).square().sum().backward()
        results.append([p.grad for p in network.parameters()])
    assert all(g is not None for g in results[0])
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_weights_of_the_shorter_network_keep_their_names(images):
    shorter, longer = small(), elongate(small(), 2, BEFORE)
    names = longer.state_dict().keys()
    assert shorter.state_dict().keys() < names
    assert "unet.final.0.conv.elongation.blocks.1.g.conv.weight" in names
    moved_from_the_start(longer)
    again = elongate(small(), 2, BEFORE)
    again.load_state_dict(longer.state_dict())
    assert torch.equal(again(*images), longer(*images))
    for p in shorter.parameters():
        nn.init.normal_(p, std=0.3)
    fresh = elongate(small(), 2, BEFORE)
    missing, unexpected = fresh.load_state_dict(shorter.state_dict(), strict=False)
    assert not unexpected
    assert all("elongation" in name for name in missing)
    assert torch.equal(fresh(*images), shorter(*images))
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict(shorter.state_dict())


def test_module_for_configurations(images):
    network = Elongated(KeypointAffine((4, 8), (8,), 6), 2, ["unet.up.0.conv", "head"])
    assert network(*images).shape == (2, 3, 4)
    assert all(name.startswith("network.") for name in network.state_dict())
    assert "network.head.elongation.blocks.0.f.conv.bias" in network.state_dict()
    copy.deepcopy(network).load_state_dict(network.state_dict())


def test_any_network(generator):
    """What is no part of patchreg; type and mode are taken over."""
    network = nn.Sequential(
        nn.Conv3d(2, 6, 3), nn.ReLU(), nn.Sequential(nn.GroupNorm(2, 6), nn.Conv3d(6, 4, 1)), nn.InstanceNorm3d(4)
    )
    network.double().eval()
    x = torch.rand((1, 2, 7, 7, 7), generator=generator, dtype=torch.float64)
    expected = network(x)
    elongate(network, 2, ["0", "2", "3"], "checkpoint", kernel_size=1, norm=False)
    assert torch.equal(network(x), expected)
    assert not any(module.training for module in network.modules())
    assert {p.dtype for p in network.parameters()} == {torch.float64}
    assert {m.kernel_size for m in network[2].elongation.modules() if isinstance(m, nn.Conv3d)} == {(1, 1, 1)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"blocks": 0}, "at least one block"),
        ({"before": []}, "name at least one layer"),
        ({"before": ["flow", "flow"]}, "named twice: flow"),
        ({"before": ["unet.down.9"]}, r"VoxelMorph has no layer 'unet.down.9'; did you mean unet.down"),
        ({"before": [""]}, "has no layer ''"),
        ({"before": ["unet"]}, r"what enters unet \(UNet\) is not known"),
        ({"before": ["unet.down.0.activation"]}, "LeakyReLU"),
        ({"before": ["unet.up.1"]}, "9 channels enter unet.up.1, .* an even number"),
    ],
)
def test_what_cannot_be_is_refused(arguments, says):
    network = VoxelMorph((4, 5, 8), (4, 8), (8,))
    if arguments.get("before") == ["unet.up.1"]:
        network = VoxelMorph((5, 4, 8), (4, 8), (8,))
    names = list(network.state_dict())
    with pytest.raises(InputError, match=says):
        elongate(network, **{"blocks": 1, "before": ["flow"], **arguments})
    assert list(network.state_dict()) == names


def test_twice_is_refused():
    network = elongate(small(), 1, ["flow"])
    with pytest.raises(InputError, match="flow has blocks before it already"):
        elongate(network, 1, ["flow"])
