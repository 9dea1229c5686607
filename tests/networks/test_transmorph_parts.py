"""What TransMorph's decoder is made of: convolutions that keep little, and B-splines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchreg.errors import InputError
from patchreg.networks.bspline import control_shape, dense_bspline
from patchreg.networks.normconv import activated, norm_conv
from patchreg.networks.upsampled_linear import conv_upsampled_linear


def plain_upsampled(x, weight):
    return F.conv3d(F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False), weight, padding=1)


def plain_norm_conv(x, weight, first=None):
    x = x if first is None else F.conv3d(x, first, padding=1)
    return F.conv3d(F.leaky_relu(F.instance_norm(x), 0.01), weight, padding=1)


def saved(function) -> list[int]:
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        function()
    return kept


@pytest.mark.parametrize("shape", [(5, 6, 7), (2, 1, 3), (1, 1, 1)])
def test_upsampled_convolution(shape, generator, tolerances):
    x, weight = (
        torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in ((2, 3, *shape), (4, 3, 3, 3, 3))
    )
    found, expected = conv_upsampled_linear(x, weight), plain_upsampled(x, weight)
    assert torch.allclose(found, expected, atol=tolerances.value_float64)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in (found, expected)), strict=True):
        assert torch.allclose(a, b, atol=tolerances.value_float64)


def test_upsampled_convolution_keeps_nothing_of_the_fine_resolution(generator):
    x = torch.randn((1, 6, 10, 10, 10), generator=generator, requires_grad=True)
    weight = torch.randn((2, 6, 3, 3, 3), generator=generator, requires_grad=True)
    assert max(saved(lambda: conv_upsampled_linear(x, weight))) <= 6 * 12**3
    assert max(saved(lambda: plain_upsampled(x, weight))) == 6 * 20**3


def test_upsampled_convolution_in_half_precision(generator, tolerances):
    x, weight = torch.randn((1, 6, 5, 4, 3), generator=generator), torch.randn((4, 6, 3, 3, 3), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        found = conv_upsampled_linear(x, weight)
    expected = plain_upsampled(x, weight)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < tolerances.half * expected.norm()


@pytest.mark.parametrize("memory", ["stored", "checkpoint"])
@pytest.mark.parametrize("first", [False, True])
def test_norm_conv(memory, first, generator, tolerances):
    x, weight, look = (
        (3 * torch.randn(size, generator=generator, dtype=torch.float64) + 1).requires_grad_()
        for size in ((2, 3 if first else 5, 6, 7, 4), (4, 5, 3, 3, 3), (5, 3, 3, 3, 3))
    )
    wanted = [x, weight, *([look] if first else [])]
    found = norm_conv(x, weight, memory, look if first else None)
    expected = plain_norm_conv(x, weight, look if first else None)
    assert torch.allclose(found, expected, atol=tolerances.value_float64)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(y, wanted, upstream) for y in (found, expected)), strict=True):
        assert torch.allclose(a, b, atol=tolerances.value_float64)


def test_norm_conv_of_images_that_need_no_gradient(generator, tolerances):
    x = torch.randn((1, 2, 6, 7, 4), generator=generator, dtype=torch.float64)
    weight = torch.randn((3, 5, 3, 3, 3), generator=generator, dtype=torch.float64, requires_grad=True)
    look = torch.randn((5, 2, 3, 3, 3), generator=generator, dtype=torch.float64, requires_grad=True)
    found, expected = (norm_conv(x, weight, memory, look).square().sum() for memory in ("checkpoint", "stored"))
    for a, b in zip(*(torch.autograd.grad(y, (weight, look)) for y in (found, expected)), strict=True):
        assert (a - b).norm() < tolerances.value_float64 * b.norm()


def test_norm_conv_keeps_its_input_alone(generator):
    x = torch.randn((1, 5, 8, 8, 8), generator=generator, requires_grad=True)
    weight = torch.randn((2, 5, 3, 3, 3), generator=generator, requires_grad=True)
    assert sorted(saved(lambda: norm_conv(x, weight, "checkpoint"))) == [weight.numel(), x.numel()]


@pytest.mark.parametrize("memory", ["stored", "checkpoint"])
def test_norm_conv_in_half_precision(memory, generator, tolerances):
    """Of features far from zero, too."""
    x = (torch.randn((1, 5, 9, 8, 7), generator=generator) + 5).bfloat16()
    weight = torch.randn((4, 5, 3, 3, 3), generator=generator).bfloat16()
    upstream = torch.randn((1, 4, 9, 8, 7), generator=generator).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        given = [t.to(dtype).requires_grad_() for t in (x, weight)]
        out = norm_conv(*given, memory if dtype == torch.bfloat16 else "stored")
        results.append([out, *torch.autograd.grad(out, given, upstream.to(dtype))])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < tolerances.half * expected.norm()


def test_activation_is_that_of_torch(generator):
    x = torch.randn((2, 3, 4, 5, 6), generator=generator)
    assert torch.allclose(activated(x), F.leaky_relu(F.instance_norm(x), 0.01), atol=1e-6)


@pytest.mark.parametrize("spacing", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(17, 8, 5), (1, 2, 30)])
def test_bspline_of_constant_and_linear_control_points(spacing, shape, tolerances):
    """The first control point lies one spacing before the first voxel."""
    sides = control_shape(shape, spacing)
    ones = dense_bspline(torch.ones(2, 3, *sides, dtype=torch.float64), spacing, shape)
    assert ones.shape == (2, 3, *shape)
    assert torch.allclose(ones, torch.ones_like(ones), atol=tolerances.value_float64)
    control, voxels = (
        torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
        for axes in (
            [(torch.arange(n, dtype=torch.float64) - 1) * spacing for n in sides],
            [torch.arange(n, dtype=torch.float64) for n in shape],
        )
    )
    assert torch.allclose(dense_bspline(control, spacing, shape), voxels, atol=tolerances.value_float64)


def test_bspline_of_one_control_point(tolerances):
    """Against scipy's basis functions."""
    interpolate = pytest.importorskip("scipy.interpolate")
    spacing, shape = 4, (20, 12, 9)
    control = torch.zeros(1, 1, *control_shape(shape, spacing), dtype=torch.float64)
    control[0, 0, 3, 2, 1] = 1
    basis = interpolate.BSpline.basis_element([-2, -1, 0, 1, 2], extrapolate=False)
    lines = [
        torch.from_numpy(basis(torch.arange(n).numpy() / spacing - (k - 1))).nan_to_num()
        for n, k in zip(shape, (3, 2, 1), strict=True)
    ]
    expected = torch.einsum("i,j,k->ijk", *lines)
    assert torch.allclose(dense_bspline(control, spacing, shape)[0, 0], expected, atol=tolerances.value_float64)


def test_bspline_has_its_gradient(generator):
    shape = (5, 4, 3)
    control = torch.randn((1, 1, *control_shape(shape, 2)), generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c: dense_bspline(c, 2, shape), control.requires_grad_())


def test_bspline_takes_volumes():
    with pytest.raises(InputError, match="control"):
        dense_bspline(torch.zeros(1, 4, 4, 4), 2, (2, 2, 2))
