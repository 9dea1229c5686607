"""Gradients taken stage by stage, so that the activations of one stage exist at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def with_gradients(value: Tensor, parameters: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """The same value, whose gradients to the parameters are taken now and handed out in its backward pass.

    The graph behind ``value`` is freed. What is kept are the gradients, which the backward pass would leave in any case:
    clipping, accumulation, gradient scaling and the hooks of data parallelism work as ever.

    Args:
        value: a scalar; it must depend on the parameters in no other way than by the graph that is freed.
        parameters: leaves; those that the value does not depend on get no gradient.
        scale: that of a gradient scaler, so that half precision does not underflow.

    Returns:
        A scalar. Its backward pass runs once, and has no second derivative.
    """
    gradients = torch.autograd.grad(value * scale, list(parameters), allow_unused=True)
    used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    result: Tensor = _HandOut.apply(value.detach(), scale, [g for _, g in used], *(p for p, _ in used))
    return result


class _HandOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.scale = gradients, scale
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were handed out already: it has one backward pass")
        factor = gradient / ctx.scale
        handed = [g.mul_(factor) for g in ctx.gradients]
        ctx.gradients = None
        return (None, None, None, *handed)
