"""The fused kernels of composition, and of scaling and squaring, as custom operators of torch.

With ``u_0 = v / 2^n`` scaling and squaring is ``u_{k+1}(x) = u_k(x) + u_k(x + u_k(x))``, and its result ``u_n``. The kernels
take the velocity itself for ``u_0``, with the factor ``2^-n``, so that it is never written down.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class _Squaring:
    """Squarings of one velocity, and room for fields, used again and again: new memory is slow on the CPU."""

    velocity: Tensor
    steps: int
    border: bool
    free: list[Tensor] = field(default_factory=list)

    def take(self) -> Tensor:
        """Room for a float32 field."""
        return self.free.pop() if self.free else torch.empty_like(self.velocity, dtype=torch.float32)

    def give_back(self, used: Tensor) -> None:
        """``used`` is wanted no more; the velocity stays."""
        if used is not self.velocity:
            self.free.append(used)

    def square(self, u: Tensor, k: int, out: Tensor) -> None:
        """``u_{k+1}`` from ``u_k``."""
        kernels(u).sample(self.job(u, k), out)

    def advance(self, u: Tensor, k: int, to: int, out: Tensor) -> None:
        """``u_to`` from ``u_k``, which is kept, ``k < to``, by turns into ``out`` and one more field."""
        if to - k == 1:
            self.square(u, k, out)
            return
        even, odd = out if out.dtype == torch.float32 else self.take(), self.take()
        for step in range(k, to):
            left = to - 1 - step
            into = out if left == 0 else odd if left % 2 else even
            self.square(u, step, into)
            u = into
        self.give_back(odd)
        if even is not out:
            self.give_back(even)

    def job(self, u: Tensor, k: int) -> Job:
        """``u_k + u_k(x + u_k)``."""
        factor = 2.0**-self.steps if k == 0 else 1.0
        shape = (u.shape[2], u.shape[3], u.shape[4])
        return Job(u, tuple(u.shape), u, None, None, shape, self.border, step=factor, gain=factor, add=True)


@torch.library.custom_op("patchreg::integrate", mutates_args=())
def _integrate(velocity: Tensor, steps: int, border: bool, stored: bool) -> tuple[Tensor, Tensor]:
    out, fields = _empty_results(velocity, steps, stored)
    squaring = _Squaring(velocity.contiguous(), steps, border)
    if steps == 0:
        out.copy_(velocity)
    elif stored:
        sources = [squaring.velocity, *fields]
        for k in range(steps):
            squaring.square(sources[k], k, out if k == steps - 1 else fields[k])
    else:
        squaring.advance(squaring.velocity, 0, steps, out)
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
    if steps == 0:
        return upstream.clone(memory_format=torch.contiguous_format)
    squaring = _Squaring(velocity.contiguous(), steps, border)
    stored = [squaring.velocity, *fields] if fields.ndim > 1 else []
    known = [(0, squaring.velocity)]  # what the fields are recomputed from, the latest last
    gradient = upstream.contiguous()
    for k in reversed(range(steps)):
        u = stored[k] if stored else _recompute(squaring, known, k)
        into = squaring.take()
        kernels(u).differentiate(squaring.job(u, k), gradient, Gradients(image=into, displacement=into))
        if k < steps - 1:
            squaring.give_back(gradient)
        if not stored:
            squaring.give_back(u)
        gradient = into
    return gradient.to(velocity.dtype)


@_integrate_backward.register_fake
def _(upstream: Tensor, velocity: Tensor, fields: Tensor, steps: int, border: bool) -> Tensor:
    return velocity.new_empty(velocity.shape)


def _recompute(squaring: _Squaring, known: list[tuple[int, Tensor]], k: int) -> Tensor:
    """``u_k``, for falling ``k``: from the latest field that is known, with checkpoints half way, and half way again.

    Seven steps are 9 squarings more, with three fields kept at most; starting from the velocity each time would be 21.
    """
    while known[-1][0] < k:
        at, u = known[-1]
        middle = (at + k + 1) // 2
        into = squaring.take()
        squaring.advance(u, at, middle, into)
        known.append((middle, into))
    return known.pop()[1]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    velocity, ctx.steps, ctx.border, _ = inputs
    ctx.save_for_backward(velocity, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or autograd would make zeros of the size of all stored fields


def _backward(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return None, None, None, None
    velocity, fields = ctx.saved_tensors
    gradient = torch.ops.patchreg.integrate_backward(upstream, velocity, fields, ctx.steps, ctx.border)
    return gradient, None, None, None


_integrate.register_autograd(_backward, setup_context=_setup_context)
