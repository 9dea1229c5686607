"""A U-Net on slabs, with full resolution in thinner slabs yet."""

from __future__ import annotations

from torch import Tensor, nn

from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.partition import Span, clip
from patchreg.distributed.scope import Scope, current
from patchreg.networks.slabs import THICKNESS, in_slabs
from patchreg.networks.surroundings import ALONE, surrounded
from patchreg.networks.unet import UNet


@stands_for(UNet)
class ShardedUNet(ShardedLayer, UNet):
    """Its layers do what there is to do; what runs slab by slab does without them.

    Each rank is brought the planes of the input on which its part of the result depends, all convolutions in a row
    together, and runs them as if these were the volume: what comes of planes that are too near to its ends is cut off.
    """

    def forward(self, x: Tensor, last: nn.Module | None = None) -> Tensor:
        return UNet.forward(self, x, last)

    def can_slab(self, last: nn.Module | None) -> bool:
        if current() is None:
            return super().can_slab(last)
        if not isinstance(current(), Scope):
            return False  # the layers that will run outside slabs have to be seen, too
        with surrounded(ALONE):
            return super().can_slab(last)

    def worth_slabs(self, x: Tensor, last: nn.Module | None) -> bool:
        """Where the planes around slabs take less memory than slabs save; alike on all ranks."""
        scope = current()
        if not isinstance(scope, Scope):
            return super().worth_slabs(x, last)
        partition = scope.layout.of(self._total(x, scope))
        if partition is None:
            return False
        planes, around = min(partition.sizes), 2 * self.last_part(last).halo
        if scope.dim == 2:
            return planes > THICKNESS + around
        return x.shape[2] * planes > (THICKNESS + around) * (planes + around)

    def first_levels(self, x: Tensor) -> Tensor:
        scope = current()
        if not isinstance(scope, Scope):
            return super().first_levels(x)
        part, total = self.first_part(), self._total(x, scope)
        spans = _around(scope, total // 2, part.halo)
        x = scope.bring(x, total, [(2 * low, 2 * high) for low, high in spans])
        with surrounded(ALONE):
            out = in_slabs(part, x)
        return _own(out, scope, total // 2, spans)

    def full_resolution(self, x: Tensor, images: Tensor, last: nn.Module | None) -> Tensor:
        scope = current()
        if not isinstance(scope, Scope):
            return super().full_resolution(x, images, last)
        part, total = self.last_part(last), self._total(images, scope)
        spans = [(low - low % 2, high + high % 2) for low, high in _around(scope, total, part.halo)]
        x = scope.bring(x, total // 2, [(low // 2, high // 2) for low, high in spans])
        images = scope.bring(images, total, spans)
        with surrounded(ALONE):
            out = in_slabs(part, x, images)
        return _own(out, scope, total, spans)

    def _total(self, images: Tensor, scope: Scope) -> int:
        """Planes of the whole images, which the first block is given, too."""
        return scope.total(self.down[0], images.shape[scope.dim])


def _around(scope: Scope, total: int, halo: int) -> list[Span]:
    """Every rank's planes, and those around them."""
    return [clip((low - halo, high + halo), total) for low, high in scope.spans(total)]


def _own(x: Tensor, scope: Scope, total: int, spans: list[Span]) -> Tensor:
    """This rank's planes of what it has of a span."""
    low, high = scope.span(total)
    return x.narrow(scope.dim, low - spans[scope.rank][0], high - low)
