"""A convolution that keeps the planes where they are: what lies beyond a slab is added to the ends of its output.

A convolution is linear, so that of an extended slab is that of the slab itself, with zeros around it, plus that of the planes
beyond, which reach a few planes at the ends only. So no extended copy is made, and the slab is convolved while the planes of
the neighbours are on their way, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchreg.distributed import communication as comm
from patchreg.distributed.exchange import Plan, fetch, give_back
from patchreg.distributed.layers.windows import Triple
from patchreg.distributed.partition import Partition, clip, widened


@dataclass(frozen=True)
class SameConvolution:
    """A convolution of stride 1 along ``dim`` that gives as many planes as it takes, padded alike on both sides.

    Args:
        partition: of input and output; every slab has at least ``reach`` planes.
        group: the ranks.
        stride: along ``dim`` 1.
        padding: zeros on either side; along ``dim`` ``reach``, half of ``dilation * (kernel - 1)``.
        dilation: of the kernel.
        groups: of channels.
    """

    partition: Partition
    group: dist.ProcessGroup
    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int

    @property
    def dim(self) -> int:
        """That is split."""
        return self.partition.dim

    @property
    def reach(self) -> int:
        """Planes that an output depends on, to either side."""
        return self.padding[self.dim - 2]

    def plan(self) -> Plan:
        """See :func:`_ends_plan`."""
        return _ends_plan(self.partition.ranks, self.dim, self.reach)

    def ends(self, x: Tensor) -> Tensor:
        """The first and the last planes of a slab, that the neighbours need; they may overlap."""
        last = x.shape[self.dim] - self.reach
        return torch.cat([x.narrow(self.dim, 0, self.reach), x.narrow(self.dim, last, self.reach)], self.dim)

    def beyond(self, brought: Tensor) -> list[Tensor]:
        """Of what was brought, the planes beyond every side, by themselves."""
        return [side.planes(brought).clone(memory_format=torch.contiguous_format) for side in self.sides()]

    def sides(self) -> list[Side]:
        """Where this rank has neighbours."""
        rank = comm.rank_in(self.group)
        left = [Side(self, True)] if rank else []
        return left + ([Side(self, False)] if rank < self.partition.ranks - 1 else [])


@dataclass(frozen=True)
class Side:
    """The planes beyond one end of a slab, and the outputs that they reach."""

    of: SameConvolution
    left: bool

    def outputs(self, out: Tensor) -> Tensor:
        """The end of a slab that is reached, a view."""
        reach, dim = self.of.reach, self.of.dim
        return out.narrow(dim, 0 if self.left else out.shape[dim] - reach, reach)

    def planes(self, brought: Tensor) -> Tensor:
        """Of what was brought, the neighbour's planes, a view."""
        reach, dim = self.of.reach, self.of.dim
        return brought.narrow(dim, 0 if self.left else brought.shape[dim] - reach, reach)

    def taps(self, weight: Tensor) -> Tensor:
        """The taps that see those planes, a view: the first, or the last."""
        dim, dilation = self.of.dim, self.of.dilation[self.of.dim - 2]
        count = -(-self.of.reach // dilation)
        return weight.narrow(dim, 0 if self.left else weight.shape[dim] - count, count)

    def padding(self, taps: Tensor) -> list[int]:
        """Zeros beside the planes, within the slab, so that every tap sees some: as ``F.pad`` takes them."""
        dim = self.of.dim
        beside = (taps.shape[dim] - 1) * self.of.dilation[dim - 2]
        return [0, 0] * (4 - dim) + ([0, beside] if self.left else [beside, 0])

    @property
    def options(self) -> tuple[Triple, Triple, Triple, bool, Triple, int]:
        """Of the operator, for planes that are padded."""
        of = self.of
        a, b, c = (0 if d == of.dim - 2 else p for d, p in enumerate(of.padding))
        return of.stride, (a, b, c), of.dilation, False, (0, 0, 0), of.groups


@lru_cache
def _ends_plan(ranks: int, dim: int, reach: int) -> Plan:
    """Neighbours' ends brought to every rank.

    It is written for the volume that is made of the ends of all slabs, in which they follow each other: so the messages, and
    their adjoint, need nothing of the slabs' size.
    """
    ends = Partition((2 * reach,) * ranks, dim)
    return Plan(ends, tuple(clip(span, ends.total) for span in widened(ends, reach, reach)))


def same_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, how: SameConvolution) -> Tensor:
    """The slab of the convolution's output, from that of its input.

    For the backward pass it keeps what the plain convolution keeps, and the planes of the neighbours. There is no second
    derivative.

    Args:
        x: this rank's slab, (B, C, I, J, K).
        weight: (c, C / groups, ...), common; its gradient is this rank's part.
        bias: (c,), the same.
        how: the convolution.
    """
    out: Tensor = _SameConvolution.apply(*in_autocast(x, weight, bias), how)
    return out


def in_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a convolution is given, of the type that autocast would give it."""
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)
    return x, weight, bias


class _SameConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: SameConvolution) -> Tensor:
        flight = fetch(how.ends(x), how.plan(), how.group)
        out = torch.ops.aten.convolution(
            x, weight, bias, how.stride, how.padding, how.dilation, False, [0, 0, 0], how.groups
        )
        beyond = how.beyond(flight.wait())
        for side, planes in zip(how.sides(), beyond, strict=True):
            taps = side.taps(weight)
            padded = F.pad(planes, side.padding(taps))
            side.outputs(out).add_(torch.ops.aten.convolution(padded, taps, None, *side.options))
        ctx.how, ctx.bias_shape = how, None if bias is None else list(bias.shape)
        ctx.save_for_backward(x, weight, *beyond)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, *beyond = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        return *gradients(grad, x, weight, beyond, ctx.how, needs, ctx.bias_shape), None


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    beyond: Sequence[Tensor] | None,
    how: SameConvolution,
    needs: Sequence[bool],
    bias_shape: list[int] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward pass of :func:`same_convolution`.

    Args:
        grad: of the output.
        x: the input; where the weight needs no gradient, something of its shape and dtype.
        weight: of the convolution.
        beyond: the input's planes beyond every side, see :meth:`SameConvolution.beyond`. None: the weight needs no gradient.
        how: the convolution.
        needs: which gradients are needed, of input, weight and bias.
        bias_shape: of the bias. None: there is none.

    Returns:
        The gradients of input, weight and bias.
    """
    needs_x, needs_weight, needs_bias = needs
    if beyond is None:
        beyond = [x.narrow(how.dim, 0, how.reach)] * len(how.sides())
    low, high = how.plan().wants[comm.rank_in(how.group)]
    shape = [high - low if d == how.dim else n for d, n in enumerate(x.shape)]
    grad_brought = x.new_zeros(shape) if needs_x else None
    parts = []
    for side, planes in zip(how.sides(), beyond, strict=True) if needs_x or needs_weight else []:
        taps = side.taps(weight)
        padding = side.padding(taps)
        grad_planes, grad_taps, _ = torch.ops.aten.convolution_backward(
            side.outputs(grad), F.pad(planes, padding), taps, None, *side.options, (needs_x, needs_weight, False)
        )
        parts.append((side, grad_taps))
        if grad_brought is not None:
            side.planes(grad_brought).copy_(F.pad(grad_planes, [-n for n in padding]))
    flight = None
    if grad_brought is not None:
        flight = give_back(grad_brought, how.plan(), torch.zeros_like(how.ends(x)), how.group)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, x, weight, bias_shape, how.stride, how.padding, how.dilation, False, [0, 0, 0], how.groups,
        (needs_x, needs_weight, needs_bias),
    )  # fmt: skip
    for side, grad_taps in parts if needs_weight else []:
        side.taps(grad_weight).add_(grad_taps)
    if flight is not None:
        ends = flight.wait()
        last = x.shape[how.dim] - how.reach
        for index, at in enumerate((0, last)):
            grad_x.narrow(how.dim, at, how.reach).add_(ends.narrow(how.dim, index * how.reach, how.reach))
    return grad_x, grad_weight, grad_bias
