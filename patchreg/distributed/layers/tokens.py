"""Layers of a Swin transformer on slabs of tokens (B, I, J, K, C)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.distributed as dist
from torch import Tensor

from patchreg.distributed.halo import exchange_halo
from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.partition import Partition, Span
from patchreg.distributed.scope import Scope, current
from patchreg.networks.attention import WindowAttention, regions
from patchreg.networks.swin import PatchMerging, SwinEncoder


@stands_for(WindowAttention)
class ShardedWindowAttention(ShardedLayer, WindowAttention):
    """Windows are shared out whole over the ranks, each to the rank that holds its middle.

    A window of a shifted grid that reaches over the border of the volume joins tokens that do not see each other. So along
    the split dimension it is taken for two windows, one at either end, with nothing beyond the border: no plane travels
    around, and what a token sees is the same.
    """

    channels_last = True

    def sharded(self, x: Tensor, *others: Tensor, scope: Scope, total: int) -> Tensor:
        if scope.layout.of(total) is None:
            return WindowAttention.forward(self, x)
        dim = scope.dim - 1
        full, shift = self.frame([total if d == dim else x.shape[d] for d in (1, 2, 3)])
        shares = shared_windows(scope.spans(total), self.window[dim - 1], shift[dim - 1])
        x = scope.bring(x, total, shares, dim)
        low, high = shares[scope.rank]
        if low < high:
            end, shift[dim - 1], full[dim - 1] = full[dim - 1], 0, high - low
            x = self.framed(x, full, shift, self._codes(x, full, shift, dim, (low, end)))
        else:  # no windows, but the dtype of what others make of theirs, and a gradient of zeros
            like = self.proj(self.qkv(x)[..., : x.shape[-1]])
            x = like + self.table.sum().to(like.dtype)
        return _moved(x, shares, scope.spans(total), dim, scope.group)

    def _codes(self, x: Tensor, full: Sequence[int], shift: Sequence[int], dim: int, place: Span) -> Tensor | None:
        """The regions of this rank's tokens, of which the first is at plane ``place[0]`` of a grid of ``place[1]``."""
        low, end = place
        before, after = max(0, -low), max(0, low + full[dim - 1] - end)
        if not (self.shifted and (any(shift) or before or after)):
            return None
        codes = regions(full, shift, x.device)
        codes.narrow(dim, 0, before).add_(1 << (dim - 1))
        codes.narrow(dim, full[dim - 1] - after, after).add_(1 << (dim - 1))
        return codes


def shared_windows(spans: Sequence[Span], size: int, shift: int) -> list[Span]:
    """The planes of every rank's windows; windows begin at ``shift`` and every ``size`` planes before and after it.

    Args:
        spans: of the ranks' slabs.
        size: planes of a window.
        shift: of the windows, less than their size.
    """
    total = spans[-1][1]
    last = -(-(total - shift) // size)
    cuts = [-1 if shift else 0]
    for _, stop in spans:  # windows whose middle comes before it
        cuts.append(min(last, max(cuts[0], -((size - 2 * (stop - shift)) // (2 * size)))))
    cuts[-1] = last
    return [(size * a + shift, size * b + shift) for a, b in pairwise(cuts)]


def _moved(x: Tensor, held: Sequence[Span], wanted: Sequence[Span], dim: int, group: dist.ProcessGroup) -> Tensor:
    """Planes of tokens brought from the ranks that hold these spans, one after the other, to those that want others."""
    tail = x.shape[3:]
    if dim == 1:  # as an image (1, B, I, J, K C)
        x = x.flatten(3)[None]
    partition = Partition(tuple(b - a for a, b in held), max(dim, 2))
    widths = [(a - low, high - b) for (a, b), (low, high) in zip(held, wanted, strict=True)]
    x = exchange_halo(x, partition, widths, group, check=False)
    return x[0].unflatten(3, tail) if dim == 1 else x


@stands_for(PatchMerging)
class ShardedPatchMerging(ShardedLayer, PatchMerging):
    """Pairs of planes come to the rank that holds what they become; an odd volume's last has zeros for its neighbour."""

    channels_last = True

    def sharded(self, x: Tensor, *others: Tensor, scope: Scope, total: int) -> Tensor:
        spans = [(2 * low, 2 * high) for low, high in scope.spans((total + 1) // 2)]
        return PatchMerging.forward(self, scope.bring(x, total, spans, scope.dim - 1))


@stands_for(SwinEncoder)
class ShardedSwinEncoder(ShardedLayer, SwinEncoder):
    """Its layers do what there is to do; whether windows fit was seen on the shape of the whole volume."""

    def forward(self, x: Tensor, *others: Tensor) -> list[Tensor]:
        return SwinEncoder.forward(self, x)

    def check_size(self, shape: Sequence[int]) -> None:
        if not isinstance(current(), Scope):
            super().check_size(shape)
