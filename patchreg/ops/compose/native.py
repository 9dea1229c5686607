"""The fused kernels of composition, and of scaling and squaring, as custom operators of torch.

With ``u_0 = v / 2^n`` scaling and squaring is ``u_{k+1}(x) = u_k(x) + u_k(x + u_k(x))``, and its result ``u_n``. The kernels
take the velocity itself for ``u_0``, with the factor ``2^-n``, so that it is never written down.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchreg.ops.warp.job import Gradients, Job
from patchreg.ops.warp.native import kernels, split_scale
from patchreg.types import Memory, Padding


def compose(u: Tensor, v: Tensor, affine: Tensor | None, scale: Tensor | float | None, padding: Padding) -> Tensor:
    """See :func:`patchreg.ops.compose`; every argument is checked and complete here."""
    matrix, step = split_scale(scale)
    return torch.ops.patchreg.warp(u, v, affine, matrix, step, v.shape[2:], "linear", padding == "border", True)


def integrate(velocity: Tensor, steps: int, padding: Padding, memory: Memory) -> Tensor:
    """See :func:`patchreg.ops.integrate`."""
    stored = memory == "stored" and torch.is_grad_enabled() and velocity.requires_grad
    return torch.ops.patchreg.integrate(velocity, steps, padding == "border", stored)[0]


@torch.library.custom_op("patchreg::integrate", mutates_args=())
def _integrate(velocity: Tensor, steps: int, border: bool, stored: bool) -> tuple[Tensor, Tensor]:
    velocity = velocity.contiguous()
    out, fields = _empty_results(velocity, steps, stored)
    if steps == 0:
        out.copy_(velocity)
    elif stored:
        for k in range(steps):
            source = velocity if k == 0 else fields[k - 1]
            _square(source, out if k == steps - 1 else fields[k], k, steps, border)
    else:
        _advance(velocity, 0, steps, steps, border, out)
    return out, fields


@_integrate.register_fake
def _(velocity: Tensor, steps: int, border: bool, stored: bool) -> tuple[Tensor, Tensor]:
    return _empty_results(velocity, steps, stored)


def _empty_results(velocity: Tensor, steps: int, stored: bool) -> tuple[Tensor, Tensor]:
    """Room for the result, and for ``u_1 .. u_{n-1}`` in float32 where they are stored."""
    fields = (max(steps - 1, 0), *velocity.shape) if stored else (0,)
    return velocity.new_empty(velocity.shape), velocity.new_empty(fields, dtype=torch.float32)


@torch.library.custom_op("patchreg::integrate_backward", mutates_args=())
def _integrate_backward(upstream: Tensor, velocity: Tensor, fields: Tensor, steps: int, border: bool) -> Tensor:
    gradient, velocity = upstream.contiguous(), velocity.contiguous()
    stored = fields.ndim > 1
    known = [(0, velocity)]  # fields that the earlier ones need not be recomputed for, the latest last
    for k in reversed(range(steps)):
        if stored:
            field = velocity if k == 0 else fields[k - 1]
        else:
            field = _recompute(known, k, steps, border)
        into = torch.empty_like(gradient, dtype=torch.float32)
        job = _job(field, k, steps, border)
        kernels(field).differentiate(job, gradient, Gradients(image=into, displacement=into))
        gradient = into
        del field, job  # their memory serves the next step
    return upstream.clone() if steps == 0 else gradient.to(velocity.dtype)


@_integrate_backward.register_fake
def _(upstream: Tensor, velocity: Tensor, fields: Tensor, steps: int, border: bool) -> Tensor:
    return velocity.new_empty(velocity.shape)


def _recompute(known: list[tuple[int, Tensor]], k: int, steps: int, border: bool) -> Tensor:
    """``u_k``, for falling ``k``: from the latest field that is known, with checkpoints half way, and half way again.

    Seven steps are 9 squarings more, with three fields kept at most; starting from the velocity each time would be 21.
    """
    while known[-1][0] < k:
        at, field = known[-1]
        middle = (at + k + 1) // 2
        known.append((middle, _advance(field, at, middle, steps, border)))
    return known[0][1] if k == 0 else known.pop()[1]


def _advance(field: Tensor, at: int, to: int, steps: int, border: bool, out: Tensor | None = None) -> Tensor:
    """``u_to`` from ``u_at``, by way of two fields at most."""
    for k in range(at, to):
        into = out if k == to - 1 and out is not None else torch.empty_like(field, dtype=torch.float32)
        _square(field, into, k, steps, border)
        field = into
    return field


def _square(field: Tensor, out: Tensor, k: int, steps: int, border: bool) -> None:
    kernels(field).sample(_job(field, k, steps, border), out)


def _job(field: Tensor, k: int, steps: int, border: bool) -> Job:
    factor = 2.0**-steps if k == 0 else 1.0
    i, j, l = field.shape[2:]
    return Job(field, tuple(field.shape), field, None, None, (i, j, l), border, step=factor, gain=factor, add=True)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    velocity, ctx.steps, ctx.border, _ = inputs
    ctx.save_for_backward(velocity, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    velocity, fields = ctx.saved_tensors
    gradient = torch.ops.patchreg.integrate_backward(upstream, velocity, fields, ctx.steps, ctx.border)
    return gradient, None, None, None


_integrate.register_autograd(_backward, setup_context=_setup_context)
