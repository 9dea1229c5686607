from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from patchreg.ops.windows import box_sum, gaussian_smooth


@pytest.mark.parametrize("window", [1, 3, 5, 7, 9, 11, 21])
@pytest.mark.parametrize("shape", [(1, 5, 7), (12, 9, 10)])
def test_box_sum_is_a_convolution_with_ones(window, shape, generator):
    x = torch.rand((2, 3, *shape), generator=generator, dtype=torch.float64)
    ones = torch.ones(3, 1, window, window, window, dtype=torch.float64)
    assert torch.allclose(box_sum(x, window), F.conv3d(x, ones, padding=window // 2, groups=3))


def test_box_sum_has_exact_gradients(generator):
    x = torch.rand((1, 1, 4, 5, 6), generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: box_sum(t, 3), (x,))
    assert torch.autograd.gradgradcheck(lambda t: box_sum(t, 3).square(), (x,))


def test_gaussian_keeps_constants_and_widens_a_point():
    x = torch.zeros(1, 1, 41, 5, 5, dtype=torch.float64)
    assert torch.allclose(gaussian_smooth(x + 3, (2.0, 1.0, 0.0)), x + 3)
    x[0, 0, 20] = 1
    y = gaussian_smooth(x, (3.0, 0.0, 0.0), truncate=5)[0, 0, :, 2, 2]
    offset = torch.arange(41, dtype=torch.float64) - 20
    assert abs(float((y * offset**2).sum()) - 9.0) < 0.01
