"""What VoxelMorph keeps for the backward pass changes what it takes, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchreg.cascade.storage import load_cascade, model_folder
from patchreg.errors import InputError, NoGradient
from patchreg.fake import Fakes
from patchreg.memory import LivePeak
from patchreg.networks import KeypointAffine, UNet, VoxelMorph, slabs, unet
from patchreg.networks.unet import ConvBlock
from patchreg.networks.upsampled_nearest import conv_upsampled_nearest


def network(memory: str, reversible: int, norm: bool = True, **options) -> VoxelMorph:
    """Stacks that are not the identity, in float64."""
    torch.manual_seed(0)
    sizes = {"encoder": (4, 8, 6), "decoder": (8, 6), "final": (6, 4), **options}
    made = VoxelMorph(**sizes, norm=norm, memory=memory, reversible=reversible)
    for name, p in made.named_parameters():
        if "stacks" in name or "flow" in name:
            nn.init.normal_(p, std=0.2)
    return made.double()


@pytest.fixture
def images(generator):
    return [torch.rand((2, 1, 12, 7, 16), generator=generator).double() for _ in range(2)]


def gradients(made: nn.Module, images: list[torch.Tensor]) -> list[torch.Tensor]:
    given = [x.clone().requires_grad_() for x in images]
    out = made(*given)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in (*given, *made.parameters()))]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("memory", "reversible"), [("checkpoint", 0), ("checkpoint", 2), ("reversible", 2)])
def test_policies_agree(memory, reversible, norm, images):
    expected = gradients(network("stored", reversible, norm), images)
    for found, wanted in zip(gradients(network(memory, reversible, norm), images), expected, strict=True):
        assert (found - wanted).norm() <= 1e-10 * wanted.norm() + 1e-10


@pytest.mark.parametrize("options", [{}, {"kernel_size": 5}, {"decoder": (8,)}, {"final": ()}, {"force_window": 3}])
@pytest.mark.parametrize("rows", [9, 30, 45])
def test_slabs_agree_with_the_whole(options, rows, generator, monkeypatch):
    """Without norm, what is checkpointed runs in slabs, here of 8 rows instead of 32; the last may have few."""
    monkeypatch.setattr(slabs, "THICKNESS", 8)
    monkeypatch.setattr(unet, "THICKNESS", 8)
    run, count = slabs.in_slabs, []
    monkeypatch.setattr(unet, "in_slabs", lambda *given: (count.append(1), run(*given))[1])
    images = [torch.rand((2, 1, rows, 5, 6), generator=generator).double() for _ in range(2)]
    expected = gradients(network("stored", 0, False, **options), images)
    assert not count
    found = gradients(network("checkpoint", 0, False, **options), images)
    assert len(count) == (1 if "decoder" in options else 2)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()


def test_slabs_in_half_precision(generator, monkeypatch, tolerances):
    monkeypatch.setattr(slabs, "THICKNESS", 8)
    monkeypatch.setattr(unet, "THICKNESS", 8)
    images = [torch.rand((1, 1, 30, 8, 8), generator=generator) for _ in range(2)]
    results = []
    for memory in ("stored", "checkpoint"):
        with torch.autocast("cpu", torch.bfloat16):
            out = network(memory, 0, False).float()(*images)
        results.append(out.detach())
    assert (results[1] - results[0]).norm() < tolerances.half * results[0].norm()


def test_slabs_have_no_second_derivative(generator):
    images = [torch.rand((1, 1, 40, 4, 4), generator=generator) for _ in range(2)]
    made = VoxelMorph((2, 4), (4,), (), memory="checkpoint")
    with pytest.raises(NoGradient, match="slab by slab has no second derivative"):
        torch.autograd.grad(made(*images).sum(), made.flow.weight, create_graph=True)


def test_compiled(generator):
    torch._dynamo.reset()
    images = [torch.rand((1, 1, 40, 4, 4), generator=generator).double() for _ in range(2)]
    made = network("checkpoint", 0, norm=False)
    expected = gradients(made, images)
    made.zero_grad()
    compiled = torch.compile(made, backend="aot_eager")
    for a, b in zip(gradients(compiled, images), expected, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm() + 1e-10


def test_new_stacks_are_the_identity(images):
    torch.manual_seed(0)
    plain = VoxelMorph((4, 8, 6), (8, 6), (6, 4)).double()
    longer = VoxelMorph((4, 8, 6), (8, 6), (6, 4), memory="reversible", reversible=3).double()
    missing, unexpected = longer.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all("stacks" in name for name in missing)
    assert torch.equal(longer(*images), plain(*images))


def test_names_of_the_weights_are_those_of_the_paper_network():
    """A trained network of an earlier version loads."""
    blocks = [f"down.{i}" for i in range(3)] + [f"up.{i}" for i in range(2)] + ["final.0"]
    names = {f"unet.{block}.conv.{kind}" for block in blocks for kind in ("weight", "bias")}
    made = VoxelMorph((4, 8, 8), (8, 8), (8,))
    assert set(made.state_dict()) == names | {"flow.weight", "flow.bias"}


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("norm", [True, False])
def test_a_step_of_the_decoder_is_a_convolution_of_both_joined(kernel_size, norm, generator):
    block = ConvBlock(5 + 3, 4, kernel_size, 1, norm, 0.2).double()
    x = torch.randn((2, 5, 3, 4, 2), generator=generator).double().requires_grad_()
    skip = torch.randn((2, 3, 6, 8, 4), generator=generator).double().requires_grad_()
    joined = torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], dim=1)
    expected = F.leaky_relu(block.norm(block.conv(joined)), 0.2)
    found = block.join(x, skip)
    assert torch.allclose(found, expected, atol=1e-12)
    wanted = [x, skip, *block.parameters()]
    weight = torch.randn(expected.shape, generator=generator).double()
    for a, b in zip(
        torch.autograd.grad(found, wanted, weight), torch.autograd.grad(expected, wanted, weight), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-11)


def test_upsampled_convolution_in_half_precision(generator, tolerances):
    x, weight = torch.randn((1, 6, 5, 4, 3), generator=generator), torch.randn((4, 6, 3, 3, 3), generator=generator)
    expected = F.conv3d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv_upsampled_nearest(x, weight)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < tolerances.half * expected.norm()


def test_the_shipped_model_gives_what_its_plain_network_gives(generator, tolerances):
    """Written with the layers of torch, without anything in place or upsampled in passing."""
    made = load_cascade(model_folder("any_contrast")).stages[1].network

    def block(part: ConvBlock, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(part.norm(part.conv(x)), 0.2)

    def plain(x: torch.Tensor) -> torch.Tensor:
        skips = []
        for part in made.unet.down:
            x = block(part, x)
            skips.append(x)
        skips.pop()
        for part in made.unet.up:
            x = block(part, torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skips.pop()], dim=1))
        for part in made.unet.final:
            x = block(part, x)
        return x

    x = torch.randn((1, made.unet.down[0].conv.in_channels, 16, 24, 16), generator=generator)
    with torch.no_grad():
        expected = plain(x)
        assert (made.unet(x) - expected).norm() < tolerances.value_float32 * expected.norm()


def peak(memory: str, rows: int = 32, **options) -> tuple[float, float]:
    """Peak of a training step, and what is kept between the passes, in channels of full resolution."""
    shape = (rows, 32, 32)
    fakes, made = Fakes(), VoxelMorph((16, 32, 32), (32, 32), (32, 16), memory=memory, **options)
    fakes.convert(made)
    images = [fakes.empty((1, 1, *shape)) for _ in range(2)]
    with fakes, LivePeak() as counted:
        out = made(*images)
        kept = counted.live
        out.square().mean().backward()
    unit = 4 * rows * 32**2
    return counted.peak / unit, kept / unit


def test_what_is_kept():
    """Stored: one tensor a convolution without norm, two with it. Policies: inputs of convolutions, or of stacks."""
    widths = 16 + (32 + 32 + 32 + 32) / 8 + 32 + 32 + 16  # what enters convolutions, with the coarser levels
    assert peak("stored")[1] < widths + 12
    assert peak("checkpoint", norm=True)[1] < widths + 12
    assert peak("stored", norm=True)[1] > 1.5 * widths
    assert peak("reversible", reversible=4)[1] < widths + 12
    assert peak("stored", reversible=4)[1] > 4 * widths
    assert peak("checkpoint", norm=True)[0] < 0.8 * peak("stored", norm=True)[0]
    assert peak("checkpoint", 160)[1] < 20  # nothing of full resolution
    assert peak("checkpoint", 160)[0] < 0.5 * peak("stored", 160)[0]
    deep, shallow = (peak("reversible", reversible=n)[0] for n in (8, 2))
    assert deep < 1.01 * shallow


def test_keypoints_and_their_policy(generator):
    torch.manual_seed(0)
    stored = KeypointAffine((4, 8, 8), (8,), 5).double()
    other = KeypointAffine((4, 8, 8), (8,), 5, memory="checkpoint").double()
    other.load_state_dict(stored.state_dict())
    images = [torch.rand((1, 1, 12, 8, 16), generator=generator).double() for _ in range(2)]
    for a, b in zip(gradients(other, images), gradients(stored, images), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_offloading_changes_nothing(images):
    made = network("reversible", 2, offload=True)
    expected = gradients(network("reversible", 2), images)
    for a, b in zip(gradients(copy.deepcopy(made), images), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"memory": "reversible"}, "VoxelMorph has no reversible blocks"),
        ({"memory": "none"}, "must be one of stored, checkpoint, reversible, got 'none'"),
        ({"reversible": -1}, "number of blocks, got -1"),
        ({"reversible": 1, "encoder": (16, 31), "decoder": (32,)}, "make every width even, got 31"),
    ],
)
def test_what_cannot_be_is_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        VoxelMorph(**arguments)
    if "memory" in arguments:
        with pytest.raises(InputError, match=says.replace("VoxelMorph", "UNet")):
            UNet(2, (4, 8), (8,), **arguments)
