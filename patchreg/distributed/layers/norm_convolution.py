"""Instance norm, leaky ReLU, convolution on slabs: of the three only the input is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchreg.distributed import communication as comm
from patchreg.distributed.exchange import fetch
from patchreg.distributed.layers.activation import sharded_activated
from patchreg.distributed.layers.convolution import conv3d
from patchreg.distributed.layers.same_convolution import SameConvolution, gradients
from patchreg.distributed.layers.statistics import Pool, Statistics
from patchreg.distributed.scope import Scope
from patchreg.networks.normconv import EPS, GROUP, SLOPE, norm_conv
from patchreg.types import Activations


def sharded_norm_conv(
    x: Tensor, weight: Tensor, memory: Activations, first: Tensor | None = None, *, scope: Scope, total: int
) -> Tensor:
    """:func:`patchreg.networks.normconv.norm_conv` of this rank's part of a tensor with ``total`` planes.

    Kept is what is kept there; besides, of every convolution in the forward and the backward pass, the planes of the
    neighbours exist while it runs.
    """
    partition = scope.layout.of(total)
    if partition is None:
        return norm_conv(x, weight, memory, first)
    run = _NormConv(scope, total, SameConvolution(partition, scope.group, (1, 1, 1), (1, 1, 1), (1, 1, 1), 1))
    if memory == "stored" or not torch.is_grad_enabled():
        return run.forward(x, weight, first)
    out: Tensor = _KeepInput.apply(x, weight, first, run)
    return out


@dataclass(frozen=True)
class _NormConv:
    """``conv3d(activated(y), weight)``, where ``y`` is ``x``, or ``conv3d(x, first)``."""

    scope: Scope
    total: int
    how: SameConvolution

    def convolved(self, x: Tensor, weight: Tensor) -> Tensor:
        return conv3d(x, weight, None, padding=1, scope=self.scope, total=self.total)

    def forward(self, x: Tensor, weight: Tensor, first: Tensor | None) -> Tensor:
        x = x if first is None else self.convolved(x, first)
        return self.convolved(sharded_activated(x, self.scope, self.total).to(weight.dtype), weight)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, first: Tensor | None, needs: list[bool]) -> list[Any]:
        """The gradients of ``x``, ``weight`` and ``first``; the same steps as in one process."""
        found: list[Any] = [None, None, None]
        statistics = Statistics(self.how.partition, self.how.group, Pool(weight.shape[1]), EPS)
        y = x if first is None else self.convolved(x, first)
        if needs[1]:
            again = sharded_activated(y, self.scope, self.total).to(weight.dtype)
            found[1] = self.pulled(grad, again, weight, [False, True])[1]
            del again
        if needs[0] or needs[2]:
            like = y if y.dtype == weight.dtype else weight.new_empty(1).expand(y.shape)
            grad_y = self.pulled(grad, like, weight, [True, False])[0].to(y.dtype)
            norm_backward(y, grad_y, statistics)
            if first is None:
                found[0] = grad_y
            else:
                found[0], found[2] = self.pulled(grad_y, x, first, [needs[0], needs[2]])
        return found

    def pulled(self, grad: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Any, Any]:
        """Gradients of the input and of the weight of a convolution; where only the first is needed ``x`` has a shape."""
        beyond = None
        if needs[1]:
            beyond = self.how.beyond(fetch(self.how.ends(x), self.how.plan(), self.how.group).wait())
        return gradients(grad, x, weight, beyond, self.how, [*needs, False])[:2]


class _KeepInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, first: Tensor | None, run: _NormConv) -> Tensor:
        ctx.save_for_backward(x, weight, first)
        ctx.run = run
        return run.forward(x, weight, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, first = ctx.saved_tensors
        return *ctx.run.backward(grad, x, weight, first, list(ctx.needs_input_grad[:3])), None


def norm_backward(x: Tensor, grad: Tensor, statistics: Statistics) -> None:
    """Turn the gradient of ``activated(x)`` into that of ``x``, in place, in single precision at least.

    References:
        Ioffe and Szegedy 2015, arXiv:1502.03167, section 3, with means over the voxels of a channel of the whole volume.
    """
    mean, variance = (each.view(*x.shape[:2], 1, 1, 1) for each in statistics.of(x))
    scale = (variance + EPS).rsqrt()
    sums = x.new_empty((2, *x.shape[:2], 1, 1, 1), dtype=mean.dtype)
    for at in range(0, x.shape[1], GROUP):
        part = slice(at, at + GROUP)
        normed, inner = _inner(x[:, part], grad[:, part], mean[:, part], scale[:, part])
        sums[0][:, part] = inner.sum((2, 3, 4), keepdim=True)
        sums[1][:, part] = normed.mul_(inner).sum((2, 3, 4), keepdim=True)
    means = comm.reduce_all(sums, "sum", statistics.group) / statistics.numbers(x)
    for at in range(0, x.shape[1], GROUP):
        part = slice(at, at + GROUP)
        normed, inner = _inner(x[:, part], grad[:, part], mean[:, part], scale[:, part])
        inner.sub_(means[0][:, part]).sub_(normed.mul_(means[1][:, part])).mul_(scale[:, part])
        grad[:, part] = inner


def _inner(x: Tensor, grad: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Some channels normalised, and their gradient before the leaky ReLU."""
    normed = (x.to(mean.dtype) - mean).mul_(scale)
    return normed, torch.ops.aten.leaky_relu_backward(grad.to(mean.dtype), normed, SLOPE, False)
