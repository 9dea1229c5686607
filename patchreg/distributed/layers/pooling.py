"""Pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.layers.windows import Window, replaced, triple
from patchreg.distributed.partition import clip
from patchreg.distributed.scope import Scope


def max_pool3d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    *,
    scope: Scope,
    total: int,
) -> Tensor:
    """``F.max_pool3d`` on slabs: this rank's part of the output, from that of a tensor with ``total`` planes."""
    axis = scope.dim - 2
    kernel, pads, dilations = triple(kernel_size), triple(padding), triple(dilation)
    strides = triple(kernel if stride is None else stride)
    window = Window(kernel[axis], strides[axis], pads[axis], pads[axis], dilations[axis])
    out_total = window.outputs(total, ceil_mode)
    spans = window.spans(scope.spans(out_total))
    inside = [clip(span, total) for span in spans]
    x = scope.bring(x, total, inside)
    (low, high), (first, end) = spans[scope.rank], inside[scope.rank]
    if (low, high) != (first, end):  # beyond the volume nothing is the largest
        x = F.pad(x, [0, 0] * (4 - scope.dim) + [first - low, high - end], value=float("-inf"))
    return F.max_pool3d(x, kernel, strides, replaced(pads, axis, 0), dilations, ceil_mode)


def avg_pool3d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    scope: Scope,
    total: int,
) -> Tensor:
    """``F.avg_pool3d`` on slabs: this rank's part of the output, from that of a tensor with ``total`` planes."""
    axis = scope.dim - 2
    kernel, pads = triple(kernel_size), triple(padding)
    strides = triple(kernel if stride is None else stride)
    window = Window(kernel[axis], strides[axis], pads[axis], pads[axis])
    out_total = window.outputs(total, ceil_mode)
    x = scope.bring(x, total, window.spans(scope.spans(out_total)))
    out = F.avg_pool3d(x, kernel, strides, replaced(pads, axis, 0), ceil_mode, count_include_pad, divisor_override)
    bounds = (-pads[axis], total + pads[axis]) if count_include_pad else (0, total)
    factors = []
    for plane in range(*scope.span(out_total)):
        low, high = window.span((plane, plane + 1))
        factors.append(kernel[axis] / (min(high, bounds[1]) - max(low, bounds[0])))  # of its planes some do not count
    if divisor_override is None and any(factor != 1 for factor in factors):
        out = out * out.new_tensor(factors).view(-1, *[1] * (4 - scope.dim))
    return out


@stands_for(nn.MaxPool3d)
class ShardedMaxPool3d(ShardedLayer, nn.MaxPool3d):
    """``nn.MaxPool3d`` without indices."""

    def unsupported(self) -> str | None:
        return "returns indices" if self.return_indices else None

    def sharded(self, x: Tensor, *, scope: Scope, total: int) -> Tensor:  # type: ignore[override]
        return max_pool3d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, scope=scope, total=total
        )


@stands_for(nn.AvgPool3d)
class ShardedAvgPool3d(ShardedLayer, nn.AvgPool3d):
    """``nn.AvgPool3d``."""

    def sharded(self, x: Tensor, *, scope: Scope, total: int) -> Tensor:  # type: ignore[override]
        return avg_pool3d(
            x, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor_override,
            scope=scope, total=total,
        )  # fmt: skip
