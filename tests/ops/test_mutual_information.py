from __future__ import annotations

import math

import pytest
import torch

from patchreg import ops
from patchreg.errors import InputError
from patchreg.ops.mutual_information import reference


def test_parzen_windows_sum_to_one():
    position = torch.linspace(1, 13, 101, dtype=torch.float64)
    for window in ("bspline", "gaussian"):
        assert torch.allclose(reference._parzen(position, 15, window).sum(dim=1), torch.ones(101).double())


def test_independent_images_share_nothing(generator):
    I = torch.rand((1, 1, 40, 40, 40), generator=generator)
    J = torch.rand((1, 1, 40, 40, 40), generator=generator)
    assert float(ops.mutual_information(I, J)) < 0.02
    assert abs(float(ops.mutual_information(I, J, normalized=True)) - 1) < 0.01


def test_two_valued_image_shares_its_entropy_with_itself():
    """Half zeros, half ones: the windows blur the bins but the two values stay apart, so MI is log 2."""
    I = torch.zeros(1, 1, 8, 8, 8, dtype=torch.float64)
    I[..., 4:] = 1
    assert math.isclose(float(ops.mutual_information(I, I, bins=64)), math.log(2), rel_tol=1e-9)
    assert math.isclose(float(ops.mutual_information(I, 5 - 3 * I, bins=64)), math.log(2), rel_tol=1e-9)


def test_slices_add_up(generator, monkeypatch):
    I, J = (torch.rand((1, 1, 9, 10, 11), generator=generator, dtype=torch.float64) for _ in range(2))
    whole = ops.mutual_information(I, J)
    monkeypatch.setattr(reference, "SLICE", 97)
    assert torch.allclose(ops.mutual_information(I, J), whole, rtol=1e-12)


def test_mask_is_a_weight(generator):
    I, J = (torch.rand((1, 1, 6, 6, 6), generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(1, 1, 6, 6, 6, dtype=torch.float64)
    mask[..., :3] = 1
    limits = {"fixed_range": (0.0, 1.0), "moving_range": (0.0, 1.0)}
    assert torch.allclose(
        ops.mutual_information(I, J, mask=mask, **limits), ops.mutual_information(I[..., :3], J[..., :3], **limits)
    )


@pytest.mark.parametrize("window", ["bspline", "gaussian"])
@pytest.mark.parametrize("normalized", [False, True])
def test_gradients(window, normalized, generator):
    I = torch.rand((1, 1, 4, 3, 4), generator=generator, dtype=torch.float64, requires_grad=True)
    J = torch.rand((1, 1, 4, 3, 4), generator=generator, dtype=torch.float64, requires_grad=True)
    limits = {"fixed_range": (-0.1, 1.1), "moving_range": (-0.1, 1.1)}
    assert torch.autograd.gradcheck(
        lambda i, j: ops.mutual_information(i, j, 16, window=window, normalized=normalized, **limits), (I, J)
    )


def test_constant_image_gives_no_nan(generator):
    I = torch.full((1, 1, 8, 8, 8), 7.0, requires_grad=True)
    J = torch.rand((1, 1, 8, 8, 8), generator=generator)
    value = ops.mutual_information(I, J)
    value.backward()
    assert abs(float(value.detach())) < 1e-5
    assert torch.isfinite(I.grad).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bins": 4}, "bins must be at least 8"),
        ({"window": "box"}, "window must be"),
        ({"fixed_range": (1.0, 0.0)}, "fixed_range must be"),
        ({"mask": torch.zeros(1, 1, 4, 4, 4)}, "mask is empty"),
    ],
)
def test_bad_input_is_told_by_name(change, says):
    with pytest.raises(InputError, match=says):
        ops.mutual_information(torch.rand(1, 1, 4, 4, 4), torch.rand(1, 1, 4, 4, 4), **change)
