from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from patchreg.errors import InputError
from patchreg.networks.elongation import Preceded
from patchreg.networks.espcn import ESPCN, voxel_shuffle


def made(memory: str = "stored", **options) -> ESPCN:
    """With stacks that are not the identity, in float64."""
    torch.manual_seed(0)
    network = ESPCN(**{"widths": (8, 12), "memory": memory, **options})
    for name, p in network.named_parameters():
        if "elongation" in name:
            nn.init.normal_(p, std=0.1)
    return network.double()


def test_sizes_of_the_paper(generator):
    network = ESPCN()
    x = torch.randn((2, 6, 11, 11, 11), generator=generator)
    assert network(x).shape == (2, 6, 14, 14, 14)
    weights = [(6, 50, 27), (50, 100, 1), (100, 48, 27)]
    assert sum(p.numel() for p in network.parameters()) == sum(a * b * k + b for a, b, k in weights)
    assert ESPCN(padding=True)(x).shape == (2, 6, 22, 22, 22)
    assert ESPCN(1, 3, padding=True)(x[:, :1, :1, :2]).shape == (2, 1, 3, 6, 33)


def test_shuffle_puts_channels_in_their_places():
    """In two dimensions it is torch's; in three, the numbers of a ramp tell their places."""
    r, shape = 3, (2, 4, 5)
    fine = torch.arange(6 * 12 * 15).view(1, 1, 6, 12, 15).float().repeat(1, 2, 1, 1, 1)
    blocks = fine.unfold(2, r, r).unfold(3, r, r).unfold(4, r, r)  # (1, 2, *shape, a, b, d)
    channels = blocks.permute(0, 1, 5, 6, 7, 2, 3, 4).reshape(1, 2 * r**3, *shape)
    assert torch.equal(voxel_shuffle(channels, r), fine)
    flat = torch.randn(1, 4, 2, 3)  # the third dimension repeated
    volume = flat.repeat_interleave(2, dim=1).unsqueeze(-1)
    assert torch.equal(voxel_shuffle(volume, 2)[0, 0, :, :, 0], F.pixel_shuffle(flat, 2)[0, 0])


def test_padding_changes_the_border_only(generator):
    inner, whole = made(), made(padding=True)
    whole.load_state_dict(inner.state_dict())
    x = torch.randn((1, 6, 9, 8, 7), generator=generator).double()
    assert torch.allclose(inner(x), whole(x)[..., 4:-4, 4:-4, 4:-4], atol=1e-12)


def test_stacks_stand_before_every_convolution_that_can_have_one():
    def places(**options):
        return [isinstance(layer, Preceded) for layer in made(blocks=2, **options).layers]

    assert places() == [True, True, True]
    assert places(channels=1) == [False, True, True]
    assert len(made(blocks=4).layers[1].elongation.blocks) == 4


def test_longer_network_starts_as_the_plain_one(generator):
    plain = ESPCN(widths=(8, 12))
    longer = ESPCN(widths=(8, 12), blocks=4, memory="reversible")
    longer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn((1, 6, 11, 11, 11), generator=generator)
    assert torch.equal(longer(x), plain(x))


@pytest.mark.parametrize("blocks", [0, 4])
def test_low_memory_and_naive_agree_in_predictions_and_gradients(blocks, generator):
    """The finding of Blumberg et al., section 3, here in float64 for all policies."""
    x = torch.randn((2, 6, 11, 11, 11), generator=generator).double()
    target = torch.randn((2, 6, 14, 14, 14), generator=generator).double()
    results = []
    for memory in ("stored", "checkpoint", "reversible")[: 3 if blocks else 2]:
        network = made(memory, blocks=blocks)
        out = network(x)
        F.mse_loss(out, target).backward()
        results.append([out.detach(), *(p.grad for p in network.parameters())])
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert (a - b).norm() <= 1e-10 * b.norm()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"upsampling": 1}, "upsampling from 2"),
        ({"widths": (0, 4)}, r"widths \(0, 4\)"),
        ({"blocks": -1}, "blocks from 0"),
        ({"memory": "reversible"}, "ESPCN has no reversible blocks"),
    ],
)
def test_what_cannot_be_is_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        ESPCN(**arguments)


def test_images_that_do_not_fit_are_refused():
    for shape in ((1, 1, 11, 11, 11), (1, 6, 4, 11, 11), (6, 11, 11, 11)):
        with pytest.raises(InputError, match=r"ESPCN takes images \(B, 6, I, J, K\) of at least 5 voxels a side"):
            ESPCN()(torch.zeros(shape))
