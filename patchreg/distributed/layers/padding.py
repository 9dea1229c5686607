"""Padded images on slabs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.partition import Span
from patchreg.distributed.scope import Scope
from patchreg.networks.padding import PadToMultiple, pad_to_multiple
from patchreg.types import Shape3


@stands_for(PadToMultiple)
class ShardedPadToMultiple(ShardedLayer, PadToMultiple):
    """Along the split dimension padding, or cutting, is one with the change to the other volume's slabs."""

    def crop(self, image: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.run("crop", image, x)
        return out

    def sharded(self, x: Tensor, *others: Tensor, scope: Scope, total: int) -> Tensor:
        extra = -total % self.multiple
        x = scope.bring(x, total, _shifted(scope.spans(total + extra), -(extra // 2)))
        return pad_to_multiple(x, self._across(scope.dim))[0]

    def sharded_crop(self, image: Tensor, x: Tensor, scope: Scope, total: int) -> Tensor:
        """``crop`` for this rank's part of an image of ``total`` planes."""
        extra = -total % self.multiple
        x = scope.bring(x, total + extra, _shifted(scope.spans(total), extra // 2))
        i, j, k = pad_to_multiple(image[:0], self._across(scope.dim))[1]
        return x[:, :, i, j, k]

    def _across(self, dim: int) -> Shape3:
        """The multiples, of which there is none along the split dimension."""
        i, j, k = (1 if d == dim else self.multiple for d in (2, 3, 4))
        return i, j, k


def _shifted(spans: Sequence[Span], by: int) -> list[Span]:
    return [(low + by, high + by) for low, high in spans]
