"""A convolution that reads other planes than its slab's, of which no copy is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchreg.distributed.layers.same_convolution import in_autocast
from patchreg.distributed.layers.windows import Triple
from patchreg.distributed.partition import Span
from patchreg.distributed.scope import Scope


@dataclass(frozen=True)
class FetchedConvolution:
    """A convolution, and the planes that it reads.

    Args:
        scope: says how tensors are split.
        total: planes of the input.
        spans: those that every rank's outputs are made of, zeros beyond the volume.
        stride: as in ``F.conv3d``.
        padding: the same; none along the split dimension.
        dilation: the same.
        groups: the same.
    """

    scope: Scope
    total: int
    spans: tuple[Span, ...]
    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int

    def brought(self, x: Tensor) -> Tensor:
        """The planes that this rank's outputs are made of."""
        return self.scope.bring(x, self.total, self.spans)


def fetched_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, how: FetchedConvolution) -> Tensor:
    """The slab of the convolution's output, from that of its input.

    For the backward pass it keeps what the plain convolution keeps; the planes are brought again. There is no second
    derivative.

    Args:
        x: this rank's part of a tensor (B, C, I, J, K).
        weight: (c, C / groups, ...), common; its gradient is this rank's part.
        bias: (c,), the same.
        how: the convolution.
    """
    out: Tensor = _FetchedConvolution.apply(*in_autocast(x, weight, bias), how)
    return out


class _FetchedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: FetchedConvolution) -> Tensor:
        ctx.how, ctx.bias_shape = how, None if bias is None else list(bias.shape)
        ctx.save_for_backward(x, weight)
        return torch.ops.aten.convolution(
            how.brought(x), weight, bias, how.stride, how.padding, how.dilation, False, [0, 0, 0], how.groups
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        how: FetchedConvolution = ctx.how
        x, weight = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            brought = how.brought(x)
        grad_brought, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad, brought.detach(), weight, ctx.bias_shape, how.stride, how.padding, how.dilation, False, [0, 0, 0],
            how.groups, ctx.needs_input_grad[:3],
        )  # fmt: skip
        grad_x = torch.autograd.grad(brought, x, grad_brought)[0] if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad_bias, None
