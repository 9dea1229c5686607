"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.layers.fetched_convolution import FetchedConvolution, fetched_convolution
from patchreg.distributed.layers.same_convolution import SameConvolution, same_convolution
from patchreg.distributed.layers.windows import Triple, Window, replaced, triple
from patchreg.distributed.scope import Scope


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scope: Scope,
    total: int,
    border: bool = False,
) -> Tensor:
    """``F.conv3d`` on slabs.

    Args:
        x: this rank's part of a tensor (B, C, I, J, K) with ``total`` planes.
        weight: as in ``F.conv3d``, common.
        bias: the same.
        stride: the same.
        padding: a number, one for each axis, ``"same"`` or ``"valid"``.
        dilation: as in ``F.conv3d``.
        groups: the same.
        scope: says how tensors are split.
        total: see ``x``.
        border: what is beyond the volume is its nearest voxel, not zero.

    Returns:
        This rank's part of the output.
    """
    axis, partition = scope.dim - 2, scope.layout.of(total)
    strides, dilations = triple(stride), triple(dilation)
    pads = _pads(weight, padding, dilations)
    before, after = pads[axis]
    window = Window(weight.shape[scope.dim], strides[axis], before, after, dilations[axis])
    out_total = window.outputs(total)
    symmetric = all(a == b for a, b in pads)
    a, b, c = (low for low, _ in pads)
    in_place = symmetric and not border and window.stride == 1 and out_total == total and window.kernel > 1
    if in_place and partition is not None and min(partition.sizes) >= before:
        return same_convolution(
            x, weight, bias, SameConvolution(partition, scope.group, strides, (a, b, c), dilations, groups)
        )
    others: Triple = replaced((a, b, c), axis, 0)
    spans = window.spans(scope.spans(out_total))
    if symmetric and not border and partition is not None and spans != partition.spans:
        return fetched_convolution(
            x, weight, bias, FetchedConvolution(scope, total, spans, strides, others, dilations, groups)
        )
    x = scope.bring(x, total, spans, outside="border" if border else "zeros")
    if border or not symmetric:
        by = [n for d in (2, 1, 0) for n in ((0, 0) if d == axis else pads[d])]
        x = F.pad(x, by, mode="replicate" if border else "constant") if any(by) else x
        others = (0, 0, 0)
    return F.conv3d(x, weight, bias, strides, others, dilations, groups)


def _pads(weight: Tensor, padding: int | str | Sequence[int], dilation: Triple) -> list[tuple[int, int]]:
    """Planes before and after, for each axis."""
    if padding == "same":
        both = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        return [(n // 2, n - n // 2) for n in both]
    return [(n, n) for n in triple(0 if isinstance(padding, str) else padding)]


@stands_for(nn.Conv3d)
class ShardedConv3d(ShardedLayer, nn.Conv3d):
    """``nn.Conv3d`` with zeros or the nearest voxel beyond the volume."""

    def unsupported(self) -> str | None:
        return None if self.padding_mode in ("zeros", "replicate") else f"has padding_mode {self.padding_mode!r}"

    def sharded(self, x: Tensor, *, scope: Scope, total: int) -> Tensor:  # type: ignore[override]
        border = self.padding_mode == "replicate"
        return conv3d(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
            scope=scope, total=total, border=border,
        )  # fmt: skip


def conv_transpose3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    scope: Scope,
    total: int,
) -> Tensor:
    """``F.conv_transpose3d`` on slabs; see :func:`conv3d`."""
    axis = scope.dim - 2
    strides, pads, more, dilations = (triple(n) for n in (stride, padding, output_padding, dilation))
    step, pad = strides[axis], pads[axis]
    reach = dilations[axis] * (weight.shape[scope.dim] - 1)  # input i makes the outputs i step - pad .. + reach
    out_total = (total - 1) * step - 2 * pad + reach + more[axis] + 1
    spans = []
    for low, high in scope.spans(out_total):
        first = min(-(-(low + pad - reach) // step), (low + pad) // step)
        last = max((high - 1 + pad) // step, -(-(high - 1 + pad - reach) // step))
        spans.append((first, last + 1))
    low, high = scope.span(out_total)
    first, end = spans[scope.rank]
    before = low + pad - first * step
    after = (end - first - 1) * step + reach + 1 - before - (high - low)
    x = scope.bring(x, total, spans)
    cropped = before >= after and before - after < max(step, dilations[axis])  # the operator itself can leave them out
    pads = replaced(pads, axis, before if cropped else 0)
    more = replaced(more, axis, before - after if cropped else 0)
    out = F.conv_transpose3d(x, weight, bias, strides, pads, more, groups, dilations)
    return out if cropped else out.narrow(scope.dim, before, high - low)


@stands_for(nn.ConvTranspose3d)
class ShardedConvTranspose3d(ShardedLayer, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d``; its ``output_size`` is that of the whole volume."""

    def sharded(  # type: ignore[override]
        self, x: Tensor, output_size: list[int] | None = None, *, scope: Scope, total: int
    ) -> Tensor:
        assert not isinstance(self.padding, str)
        stride, padding, kernel, dilation = map(list, (self.stride, self.padding, self.kernel_size, self.dilation))
        shape = [total if d == scope.dim else n for d, n in enumerate(x.shape)]
        whole = x.new_empty(shape, device="meta")
        more = self._output_padding(whole, output_size, stride, padding, kernel, 3, dilation)
        return conv_transpose3d(
            x, self.weight, self.bias, stride, padding, more, self.groups, dilation, scope=scope, total=total
        )
