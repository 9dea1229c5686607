from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchreg.errors import InputError
from patchreg.networks import VoxelMorph
from patchreg.networks.force import lncc_force
from patchreg.ops.windows import gaussian_smooth


@pytest.fixture
def image(generator):
    return gaussian_smooth(torch.rand((2, 1, 20, 22, 24), generator=generator), (1.5,) * 3)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_points_to_where_the_moving_image_went(image, dim):
    """moving(x) = fixed(x - e): the displacement that undoes it is +e along that axis."""
    moving = torch.roll(image, 1, dims=dim + 2)
    force = lncc_force(image, moving, 5)[:, :, 4:-4, 4:-4, 4:-4].mean(dim=(0, 2, 3, 4))
    other = [d for d in range(3) if d != dim]
    assert force[dim] > 0.2
    assert force[other].abs().max() < 0.3 * force[dim]


def test_a_small_step_along_it_raises_the_similarity(image, generator):
    from patchreg import ops

    noise = gaussian_smooth(torch.randn((2, 3, 20, 22, 24), generator=generator), (3.0,) * 3) * 20
    moving = ops.warp(image, noise)
    force = lncc_force(image, moving, 5)
    before, after = (float(ops.lncc(image, ops.warp(moving, s * force), 5)) for s in (0.0, 0.05))
    assert after > before + 1e-3


def test_does_not_depend_on_units_or_on_the_sign_of_contrast(image):
    moving = torch.roll(image, 1, dims=2)
    force = lncc_force(image, moving, 5)
    assert torch.allclose(force.square().mean(dim=(1, 2, 3, 4)), torch.ones(2), atol=1e-4)
    inside = (..., slice(5, -5), slice(5, -5), slice(5, -5))  # outside the volume lie zeros, whatever the contrast
    for other in (lncc_force(1 - image, moving, 5), lncc_force(image, 2 - 2 * moving, 5)):
        assert F.cosine_similarity(other[inside].flatten(), force[inside].flatten(), dim=0) > 0.99


def test_of_nothing_is_nothing():
    blank = torch.zeros((1, 1, 8, 8, 8))
    assert (lncc_force(blank, blank, 5) == 0).all()


def test_channels_add_up(image):
    moving = torch.roll(image, 1, dims=2)
    two = lncc_force(image.repeat(1, 2, 1, 1, 1), moving.repeat(1, 2, 1, 1, 1), 5)
    assert torch.allclose(two, lncc_force(image, moving, 5), atol=1e-4)


def test_in_a_network(image):
    network = VoxelMorph([8, 16], [8], [], norm=True, force_window=5)
    moving = torch.roll(image, 1, dims=2)
    torch.nn.init.normal_(network.flow.weight, std=0.1)
    with torch.inference_mode():
        still = network(image, moving)
    trained = network(image, moving)
    assert torch.allclose(still, trained, atol=1e-5)
    F.mse_loss(trained, torch.ones_like(trained)).backward()
    assert all(p.grad is not None for p in network.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert network(image, moving).dtype == torch.float32


@pytest.mark.parametrize("window", [-1, 4])
def test_window_must_be_odd(window):
    with pytest.raises(InputError, match="force_window"):
        VoxelMorph([8, 16], [8], [], force_window=window)
