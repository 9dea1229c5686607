from __future__ import annotations

import pytest
import torch

from patchreg import ops
from patchreg.errors import InputError


def test_translations_add_up():
    u, v = torch.zeros(2, 1, 3, 9, 9, 9, dtype=torch.float64)
    u[:, 0], v[:, 2] = 2.0, -1.5
    out = ops.compose(u, v)
    assert torch.allclose(out[:, 0], u[:, 0])
    assert torch.allclose(out[:, 2], v[:, 2])


def test_order_is_v_first(generator):
    u = torch.rand((1, 3, 8, 9, 7), generator=generator, dtype=torch.float64)
    v = torch.rand((1, 3, 8, 9, 7), generator=generator, dtype=torch.float64)
    assert torch.allclose(ops.compose(u, v), v + ops.warp(u, v, padding="border"))


def test_fields_on_different_lattices(generator):
    """A constant field on a lattice of half the spacing adds as it is."""
    u = torch.full((1, 3, 20, 20, 20), 0.7, dtype=torch.float64)
    v = torch.rand((1, 3, 9, 9, 9), generator=generator, dtype=torch.float64)
    affine = torch.tensor([[2.0, 0, 0, 0.5], [0, 2, 0, 0.5], [0, 0, 2, 0.5]], dtype=torch.float64)
    assert torch.allclose(ops.compose(u, v, affine, 2.0), v + 0.7)


def test_integral_of_a_linear_velocity_is_the_exponential():
    """dx/dt = a x has the flow x exp(a): scaling and squaring must find it in the middle of the field."""
    n, a = 65, 0.2
    x = torch.arange(n, dtype=torch.float64) - n // 2
    v = torch.zeros(1, 3, n, 5, 5, dtype=torch.float64)
    v[0, 0] = a * x[:, None, None]
    u = ops.integrate(v, steps=10)
    middle = slice(20, 45)
    expected = x[middle] * (torch.exp(torch.tensor(a)) - 1)
    assert torch.allclose(u[0, 0, middle, 2, 2], expected.double(), atol=1e-3)
    assert u[0, 1:].abs().max() == 0


def test_integral_backwards_is_the_inverse(generator):
    from patchreg.ops.windows import gaussian_smooth

    v = gaussian_smooth(torch.randn((1, 3, 24, 22, 20), generator=generator, dtype=torch.float64), (3.0,) * 3) * 12
    both = ops.compose(ops.integrate(v), ops.integrate(-v))
    assert both[..., 5:-5, 5:-5, 5:-5].abs().max() < 0.05
    assert v.abs().max() > 1


def test_gradients(generator):
    v = (torch.rand((1, 3, 4, 5, 3), generator=generator, dtype=torch.float64) * 0.7 + 0.1).requires_grad_()
    u = torch.rand((1, 3, 4, 5, 3), generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: ops.compose(a, b), (u, v))
    assert torch.autograd.gradcheck(lambda b: ops.integrate(b, 3), (v,))


def test_bad_input_is_told_by_name():
    with pytest.raises(InputError, match="u must have shape"):
        ops.compose(torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(InputError, match="steps must not be negative"):
        ops.integrate(torch.zeros(1, 3, 4, 4, 4), -1)
