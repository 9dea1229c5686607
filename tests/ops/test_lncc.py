from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchreg import ops
from patchreg.errors import InputError


def by_convolution(I, J, window, eps=1e-5):
    """The formula of VoxelMorph's NCC, as its text has it, with an all-ones convolution."""
    ones = torch.ones(1, 1, window, window, window, dtype=I.dtype)

    def total(x):
        return F.conv3d(x, ones, padding=window // 2)

    I_sum, J_sum, II, JJ, IJ = total(I), total(J), total(I * I), total(J * J), total(I * J)
    n = window**3
    u_I, u_J = I_sum / n, J_sum / n
    cross = IJ - u_J * I_sum - u_I * J_sum + u_I * u_J * n
    I_var = II - 2 * u_I * I_sum + u_I * u_I * n
    J_var = JJ - 2 * u_J * J_sum + u_J * u_J * n
    return cross * cross / (I_var * J_var + eps)


def brain_like(generator, shape, scale=1.0):
    """Smooth structure in the middle, exactly zero around it."""
    from patchreg.ops.windows import gaussian_smooth

    x = gaussian_smooth(torch.rand((1, 1, *shape), generator=generator, dtype=torch.float64), (1.5,) * 3)
    x[..., : shape[0] // 4, :, :] = 0
    x[..., :, -shape[1] // 4 :, :] = 0
    return x * scale


@pytest.mark.parametrize("window", [3, 5, 9])
@pytest.mark.parametrize("shape", [(1, 5, 7), (13, 17, 11), (31, 37, 29)])
def test_equals_the_formula_in_float64(window, shape, generator, tolerances):
    I = torch.rand((2, 1, *shape), generator=generator, dtype=torch.float64)
    J = torch.rand((2, 1, *shape), generator=generator, dtype=torch.float64)
    expected = by_convolution(I, J, window)
    assert torch.allclose(ops.lncc(I, J, window, reduction="none"), expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(ops.lncc(I, J, window), expected.mean())
    assert torch.allclose(ops.lncc(I, J, window, reduction="sum"), expected.sum())


def test_perfect_match_is_one_and_contrast_does_not_matter(generator):
    I = torch.rand((1, 1, 15, 16, 14), generator=generator, dtype=torch.float64)
    inside = (..., slice(4, -4), slice(4, -4), slice(4, -4))
    assert torch.allclose(ops.lncc(I, 3 - 2 * I, 9, reduction="none")[inside], torch.tensor(1.0).double(), atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 4095.0])
def test_float32_on_brain_like_images(scale, generator, tolerances):
    """Zero background and raw intensities, where running sums that subtract lose every digit."""
    I, J = (brain_like(generator, (33, 30, 35), scale) for _ in range(2))
    exact = ops.lncc(I, J, 9)
    assert abs(float(ops.lncc(I.float(), J.float(), 9)) - float(exact)) < 1e-4 * float(exact)
    grads = []
    for dtype in (torch.float64, torch.float32):
        i, j = (t.detach().to(dtype).clone().requires_grad_() for t in (I, J))
        ops.lncc(i, j, 9).backward()
        grads.append((i.grad.double(), j.grad.double()))
    for exact_grad, grad in zip(*grads, strict=True):
        assert (grad - exact_grad).norm() < 1e-3 * exact_grad.norm()


@pytest.mark.parametrize("value", [0.0, 1.0, 4095.0])
def test_constant_images_give_zero_and_no_nan(value, generator):
    I = torch.full((1, 1, 12, 12, 12), value, requires_grad=True)
    J = (100 * torch.rand((1, 1, 12, 12, 12), generator=generator)).requires_grad_()
    map_ = ops.lncc(I, J, 5, reduction="none")
    assert map_[..., 4:-4, 4:-4, 4:-4].abs().max() == 0
    map_.sum().backward()
    assert torch.isfinite(I.grad).all()
    assert torch.isfinite(J.grad).all()


def test_gradients(generator):
    I = torch.rand((1, 2, 6, 5, 7), generator=generator, dtype=torch.float64, requires_grad=True)
    J = torch.rand((1, 2, 6, 5, 7), generator=generator, dtype=torch.float64, requires_grad=True)
    mask = (torch.rand((1, 1, 6, 5, 7), generator=generator) > 0.3).double()
    for options in ({}, {"mask": mask}, {"kernel": "gaussian"}):
        assert torch.autograd.gradcheck(lambda i, j, o=options: ops.lncc(i, j, 5, **o), (I, J))


def test_mask_leaves_voxels_out_of_windows_and_mean(generator):
    I = torch.rand((1, 1, 14, 13, 12), generator=generator, dtype=torch.float64)
    J = torch.rand((1, 1, 14, 13, 12), generator=generator, dtype=torch.float64)
    mask = torch.ones(1, 1, 14, 13, 12)
    assert torch.allclose(ops.lncc(I, J, 5, mask=mask), ops.lncc(I, J, 5))
    mask[..., 7:, :, :] = 0
    masked = ops.lncc(I, J, 5, mask=mask)
    I[..., 7:, :, :], J[..., 7:, :, :] = 1e3, torch.rand((7, 13, 12), generator=generator).double()
    assert torch.allclose(ops.lncc(I, J, 5, mask=mask), masked)


def test_half_precision(generator, tolerances):
    I, J = (torch.rand((1, 1, 16, 16, 16), generator=generator) * 4000 for _ in range(2))
    exact = float(ops.lncc(I.double(), J.double()))
    for dtype in (torch.float16, torch.bfloat16):
        value = ops.lncc(I.to(dtype), J.to(dtype))
        assert value.dtype == torch.float32
        assert abs(float(value) - exact) < tolerances.half * exact


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 4}, "window must be odd"),
        ({"mask": torch.zeros(1, 1, 4, 4, 4)}, "mask is empty"),
        ({"mask": torch.ones(1, 1, 4, 4, 5)}, "mask must have shape"),
        ({"reduction": "median"}, "reduction must be"),
        ({"kernel": "hat"}, "kernel must be"),
        ({"moving": torch.zeros(1, 1, 4, 4, 5)}, "one shape"),
        ({"moving": torch.zeros(1, 1, 4, 4, 4, dtype=torch.int32)}, "floating"),
        ({"moving": torch.zeros(4, 4, 4)}, "moving must have shape"),
    ],
)
def test_bad_input_is_told_by_name(change, says):
    with pytest.raises(InputError, match=says):
        ops.lncc(**{"fixed": torch.zeros(1, 1, 4, 4, 4), "moving": torch.zeros(1, 1, 4, 4, 4), **change})
