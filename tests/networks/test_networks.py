from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from patchreg.errors import InputError
from patchreg.networks import KeypointAffine, UNet, VoxelMorph
from patchreg.networks.keypoints import fit_affine


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("shape", [(16, 16, 16), (17, 31, 23), (5, 40, 9)])
@pytest.mark.parametrize("steps", [0, 4])
def test_voxelmorph_takes_any_size(shape, steps, generator):
    network = VoxelMorph(encoder=(4, 8, 8), decoder=(8, 8), final=(8,), integration_steps=steps)
    fixed, moving = (torch.rand((2, 1, *shape), generator=generator) for _ in range(2))
    out = network(fixed, moving)
    assert out.shape == (2, 3, *shape)
    assert out.dtype == torch.float32
    assert out.abs().max() < 0.01  # close to the identity before training
    out.square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_default_is_the_papers_network():
    """VoxelMorph's default has 16-32-32-32(-32) down and 32 x 4, 32, 16, 16 up; its count follows from the widths."""
    down = [(2, 16), (16, 32), (32, 32), (32, 32), (32, 32)]
    up = [(32 + 32, 32), (32 + 32, 32), (32 + 32, 32), (32 + 16, 32)]
    rest = [(32, 32), (32, 16), (16, 16), (16, 3)]
    assert parameters(VoxelMorph()) == sum(27 * a * b + b for a, b in down + up + rest)


@pytest.mark.parametrize(("decoder", "reduction"), [((8, 8), 1), ((8,), 2)])
def test_half_resolution_flow_is_in_voxels_of_the_patch(decoder, reduction):
    """A constant flow comes out as the same constant displacement, integrated or not, at any resolution."""
    for steps in (0, 5):
        network = VoxelMorph(encoder=(4, 8, 8), decoder=decoder, final=(4,), integration_steps=steps)
        assert network.unet.reduction == reduction
        torch.nn.init.zeros_(network.flow.weight)
        torch.nn.init.constant_(network.flow.bias, 1.5)
        out = network(torch.rand(1, 1, 16, 16, 16), torch.rand(1, 1, 16, 16, 16))
        assert torch.allclose(out, torch.tensor(1.5), atol=1e-4)


def test_padding_does_not_shift_the_answer(generator):
    """An odd size gets the answer of the same image with a rim of zeros, cut at the right place."""
    network = VoxelMorph(encoder=(4, 8, 8), decoder=(8, 8), final=())
    torch.nn.init.normal_(network.flow.weight, std=1.0)
    fixed, moving = (torch.rand((1, 1, 11, 9, 14), generator=generator) for _ in range(2))
    rim = (1, 1, 1, 2, 0, 1)  # what makes multiples of four, evenly
    whole = network(F.pad(fixed, rim), F.pad(moving, rim))
    assert torch.allclose(network(fixed, moving), whole[..., :11, 1:10, 1:15], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"encoder": (8,)}, "1 to 0 decoder steps"),
        ({"decoder": (8,) * 5}, "1 to 4 decoder steps, got 5"),
        ({"kernel_size": 4}, "kernel_size must be odd"),
        ({"final": (0,)}, "positive"),
        ({"integration_steps": -1}, "integration_steps"),
    ],
)
def test_bad_widths_are_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        VoxelMorph(**arguments)


def test_unet_options(generator):
    x = torch.rand((1, 2, 16, 16, 16), generator=generator)
    assert UNet(2, (4, 8, 8), (8,), (5,), norm=True)(x).shape == (1, 5, 8, 8, 8)


def test_fit_finds_a_known_affine(generator):
    source = torch.rand((2, 20, 3), generator=generator, dtype=torch.float64)
    affine = torch.eye(3, 4, dtype=torch.float64) + 0.2 * torch.randn(
        (2, 3, 4), generator=generator, dtype=torch.float64
    )
    target = source @ affine[:, :, :3].transpose(1, 2) + affine[:, None, :, 3]
    weight = torch.rand((2, 20), generator=generator, dtype=torch.float64)
    found = fit_affine(source, target, weight / weight.sum(dim=1, keepdim=True), 1e-12)
    assert torch.allclose(found, affine, atol=1e-8)
    flat = torch.zeros(1, 20, 3, dtype=torch.float64)
    assert torch.allclose(fit_affine(flat, flat, torch.full((1, 20), 0.05).double(), 1e-4), torch.eye(3, 4).double())


def test_keypoint_affine_is_the_identity_at_the_start_and_for_equal_images(generator):
    network = KeypointAffine((4, 8, 8), (8,), 12)
    fixed, moving = (torch.rand((2, 1, 19, 16, 23), generator=generator) for _ in range(2))
    assert (network(fixed, moving) - torch.eye(3, 4)).abs().max() < 0.05
    torch.nn.init.normal_(network.head.weight, std=0.5)
    assert (network(fixed, fixed) - torch.eye(3, 4)).abs().max() < 1e-5
    assert network(fixed, moving).shape == (2, 3, 4)


def test_keypoints_are_in_the_centred_frame():
    """A network that passes intensities through finds a bright point where it is; the longest side is -1..1."""
    network = KeypointAffine((1, 1), (1,), 1, kernel_size=1, norm=False)
    for p in network.parameters():
        torch.nn.init.zeros_(p)
    with torch.no_grad():
        network.unet.down[0].conv.weight.fill_(1.0)
        network.unet.up[0].conv.weight[:, 1] = 1.0  # the skip of full resolution
        network.head.weight.fill_(1.0)
    image = torch.zeros(1, 1, 11, 21, 7)
    image[0, 0, 9, 5, 2] = 1e6
    points, _ = network.detect(image)
    expected = torch.tensor([(9 - 5) / 10.5, (5 - 10) / 10.5, (2 - 3) / 10.5])
    assert torch.allclose(points[0, 0], expected, atol=1e-2)


def test_keypoint_affine_learns_a_rotation(generator):
    """A few steps on one rotated pair of anisotropic size must bring the map near the known rotation."""
    from conftest import blobs

    from patchreg.cascade.stage import frame
    from patchreg.spatial import Affine, Grid

    torch.manual_seed(0)
    grid = Grid.aligned((0, 0, 0), (20, 24, 16), 4.0)
    turn = torch.eye(4, dtype=torch.float64)
    turn[0, 0] = turn[1, 1] = math.cos(0.3)
    turn[0, 1], turn[1, 0] = -math.sin(0.3), math.sin(0.3)
    image = blobs(grid, width_mm=8.0)
    fixed = image.batch / 200
    moving = Affine(torch.linalg.inv(turn)).on(grid).sample(image) / 200  # moving(R x) = fixed(x)
    target = (torch.linalg.inv(frame(grid)) @ turn @ frame(grid))[:3].float()
    network = KeypointAffine((8, 16), (16,), 16, norm=True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        loss = (network(fixed, moving)[0] - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.01
    assert float((torch.eye(3, 4) - target).square().sum()) > 0.1
