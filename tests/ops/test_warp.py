from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchreg import ops
from patchreg.errors import BackendUnavailable, InputError, NoGradient


def linear_image(shape, slope=(1.0, 2.0, -3.0)):
    """An image whose linear interpolation is exact everywhere inside."""
    i, j, k = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    return (slope[0] * i + slope[1] * j + slope[2] * k)[None, None]


def test_identity_gives_the_image_back(generator):
    image = torch.rand((2, 3, 7, 5, 6), generator=generator, dtype=torch.float64)
    assert torch.allclose(ops.warp(image), image, atol=1e-14)


def test_affine_and_displacement_are_in_index_coordinates(generator):
    image = linear_image((20, 21, 22))
    u = 0.5 * torch.rand((1, 3, 6, 5, 4), generator=generator, dtype=torch.float64)
    affine = torch.tensor([[1.1, 0.1, 0.0, 4], [0.0, 0.9, 0.2, 5], [0.1, 0.0, 1.0, 6]], dtype=torch.float64)
    scale = torch.tensor([[2.0, 0, 0], [0, 1, 0.5], [0, 0, 1]], dtype=torch.float64)
    index = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (6, 5, 4)), indexing="ij"))
    at = torch.einsum("cd,dijk->cijk", affine[:, :3], index) + affine[:, 3, None, None, None]
    at = at + torch.einsum("cd,dijk->cijk", scale, u[0])
    expected = at[0] + 2 * at[1] - 3 * at[2]
    assert torch.allclose(ops.warp(image, u, affine, scale)[0, 0], expected, atol=1e-10)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("shape", [(7, 9, 8), (1, 5, 7), (31, 37, 29)])
def test_equals_grid_sample(shape, padding, generator):
    image = torch.rand((2, 2, *shape), generator=generator, dtype=torch.float64)
    u = 6 * torch.rand((2, 3, *shape), generator=generator, dtype=torch.float64) - 3
    index = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij"))
    at = (index + u).permute(0, 2, 3, 4, 1)
    size = torch.tensor(shape, dtype=torch.float64)
    lattice = ((2 * at + 1) / size - 1).flip(-1)
    expected = F.grid_sample(image, lattice, padding_mode=padding, align_corners=False)
    assert torch.allclose(ops.warp(image, u, padding=padding), expected, atol=1e-12)


def test_parts_on_threads_equal_one_batch(generator):
    """The CPU path that shares out voxels gives the values of the plain one, which a gradient to the image takes."""
    image = torch.rand((1, 3, 8, 6, 10), generator=generator)
    u = 4 * torch.rand((1, 3, 8, 6, 10), generator=generator) - 2
    plain = ops.warp(image.clone().requires_grad_(), u)
    assert torch.equal(ops.warp(image, u), plain.detach())


def test_gradients(generator):
    image = torch.rand((2, 2, 4, 5, 3), generator=generator, dtype=torch.float64, requires_grad=True)
    u = (torch.rand((2, 3, 3, 4, 5), generator=generator, dtype=torch.float64) * 1.5 + 0.13).requires_grad_()
    affine = torch.eye(3, 4, dtype=torch.float64) * 0.9 + 0.013
    affine.requires_grad_()
    for padding in ("zeros", "border"):
        assert torch.autograd.gradcheck(lambda i, d, a, p=padding: ops.warp(i, d, a, padding=p), (image, u, affine))


def test_nearest_and_label_modes_keep_integers(generator):
    labels = torch.randint(0, 500, (1, 1, 6, 7, 8), generator=generator, dtype=torch.int32)
    u = 2 * torch.rand((1, 3, 6, 7, 8), generator=generator) - 1
    for mode in ("nearest", "label"):
        out = ops.warp(labels, u, mode=mode)
        assert out.dtype == torch.int32
        assert set(out.unique().tolist()) <= set(labels.unique().tolist()) | {0}


def test_label_mode_is_the_vote_of_one_hot_maps(generator):
    labels = torch.randint(0, 4, (1, 1, 9, 8, 7), generator=generator)
    u = 3 * torch.rand((1, 3, 9, 8, 7), generator=generator, dtype=torch.float64) - 1.5
    one_hot = F.one_hot(labels[0, 0], 4).permute(3, 0, 1, 2)[None].double()
    expected = ops.warp(one_hot, u, padding="border").argmax(dim=1, keepdim=True)
    assert torch.equal(ops.warp(labels, u, mode="label", padding="border"), expected)


def test_half_precision_is_interpolated_in_float32(generator, tolerances):
    image = torch.rand((1, 1, 8, 8, 8), generator=generator)
    u = 2 * torch.rand((1, 3, 8, 8, 8), generator=generator) - 1
    exact = ops.warp(image.double(), u.double())
    for dtype in (torch.float16, torch.bfloat16):
        out = ops.warp(image.to(dtype), u)
        assert out.dtype == dtype
        assert (out.double() - exact).norm() / exact.norm() < tolerances.half


def test_positions_do_not_suffer_from_autocast(generator):
    image = linear_image((300, 4, 4), (1.0, 0.0, 0.0)).float()
    u = torch.full((1, 3, 300, 4, 4), 0.25)
    u[:, 1:] = 0
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.warp(image, u, scale=torch.eye(3))
    assert torch.allclose(out[0, 0, :-1], image[0, 0, :-1] + 0.25, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"displacement": torch.zeros(1, 4, 4, 4, 3)}, "move the components to dim 1"),
        ({"displacement": torch.zeros(2, 3, 4, 4, 4), "affine": torch.zeros(3, 3, 4)}, "batch sizes"),
        ({"affine": torch.zeros(4, 4)}, r"affine must have shape \(3, 4\)"),
        ({"mode": "cubic"}, "mode must be"),
        ({"padding": "wrap"}, "padding must be"),
        ({"displacement": torch.zeros(1, 3, 4, 4, 4), "shape": (4, 4, 5)}, "contradicts"),
        ({"backend": "cuda"}, "backend must be"),
    ],
)
def test_bad_input_is_told_by_name(arguments, says):
    with pytest.raises(InputError, match=says):
        ops.warp(torch.zeros(1, 1, 4, 4, 4), **arguments)


def test_no_silent_zero_gradient():
    u = torch.zeros(1, 3, 4, 4, 4, requires_grad=True)
    for mode in ("nearest", "label"):
        with pytest.raises(NoGradient, match="use mode='linear'"):
            ops.warp(torch.zeros(1, 1, 4, 4, 4), u, mode=mode)
    with torch.no_grad():
        ops.warp(torch.zeros(1, 1, 4, 4, 4), u, mode="nearest")


def test_native_never_falls_back_in_silence():
    with pytest.raises(BackendUnavailable, match="warp cannot run on its native kernel: .* not torch.float64"):
        ops.warp(torch.zeros(1, 1, 4, 4, 4, dtype=torch.float64), backend="native")
