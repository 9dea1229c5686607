"""Instance norm, leaky ReLU, convolution: of the three only the input is kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchreg.types import Activations

GROUP = 2
"""Channels that are normalised again at a time in the backward pass."""

EPS = 1e-5
"""Added to the variance of a channel."""

SLOPE = 0.01
"""Of the leaky ReLU."""


def activated(x: Tensor) -> Tensor:
    """Instance norm without parameters, then a leaky ReLU, in one new tensor."""
    flat = x.reshape(1, -1, *x.shape[2:])
    # with parameters, means and variances are float32; without, those of half precision have half precision
    one = flat.new_ones(flat.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    normed = F.batch_norm(flat, None, None, one, torch.zeros_like(one), training=True, eps=EPS)
    return F.leaky_relu_(normed, SLOPE).view(x.shape)


def norm_conv(x: Tensor, weight: Tensor, memory: Activations, first: Tensor | None = None) -> Tensor:
    """``conv3d(activated(y), weight)``, where ``y`` is ``x``, or ``conv3d(x, first)``; padded, without biases.

    Unless everything is stored, only ``x`` is kept. The backward pass makes the activation again and then its gradient,
    one after the other, and turns that one into the gradient of ``y`` in place: with ``y`` and the gradient that is given,
    three tensors of full size exist at most, where a checkpoint needs five, and no convolution but ``first`` runs again.

    Args:
        x: (B, C, I, J, K).
        weight: (c, C, 3, 3, 3); its dtype is that of the convolution.
        memory: what is kept for the backward pass.
        first: (C', C, 3, 3, 3), of the dtype of ``x``, or None.

    Returns:
        (B, c, I, J, K).
    """
    if memory == "stored" or not torch.is_grad_enabled():
        return _forward(x, weight, first)
    result: Tensor = _NormConv.apply(x, weight, first)
    return result


def _forward(x: Tensor, weight: Tensor, first: Tensor | None) -> Tensor:
    x = activated(x if first is None else F.conv3d(x, first, padding=1)).to(weight.dtype)
    return F.conv3d(x, weight, padding=1)


class _NormConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, first: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, first)
        return _forward(x, weight, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, first = ctx.saved_tensors
        needs_x, needs_weight, needs_first = ctx.needs_input_grad
        grad_x = grad_weight = grad_first = None
        y = x if first is None else F.conv3d(x, first, padding=1)
        if needs_weight:
            grad_weight = _conv_backward(grad, activated(y).to(weight.dtype), weight, (False, True))[1]
        if needs_x or needs_first:
            like = y if y.dtype == weight.dtype else weight.new_empty(1).expand(y.shape)
            grad_y = _conv_backward(grad, like, weight, (True, False))[0].to(y.dtype)
            for part, out in zip(y.split(GROUP, 1), grad_y.split(GROUP, 1), strict=True):
                out.copy_(_norm_backward(part, out))
            if first is None:
                grad_x = grad_y
            else:
                grad_x, grad_first = _conv_backward(grad_y, x, first, (needs_x, needs_first))
        return grad_x, grad_weight, grad_first


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weight of a padded 3x3x3 convolution; for the first ``x`` only has a shape."""
    one, zero = [1, 1, 1], [0, 0, 0]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, one, one, one, False, zero, 1, (*needs, False)
    )
    return grad_x, grad_weight


def _norm_backward(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``x`` from that of ``activated(x)``, in single precision at least.

    References:
        Ioffe and Szegedy 2015, arXiv:1502.03167, section 3, with means over the voxels of a channel.
    """
    voxels, dtype = (2, 3, 4), torch.promote_types(x.dtype, torch.float32)
    x = x.to(dtype)
    variance, mean = torch.var_mean(x, voxels, correction=0, keepdim=True)
    scale = (variance + EPS).rsqrt()
    x = (x - mean).mul_(scale)
    grad = torch.ops.aten.leaky_relu_backward(grad.to(dtype), x, SLOPE, False)
    covariance = (grad * x).mean(voxels, keepdim=True)
    return grad.sub_(grad.mean(voxels, keepdim=True)).sub_(x.mul_(covariance)).mul_(scale)
