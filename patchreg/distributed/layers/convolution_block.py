"""The blocks of a U-Net on slabs."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.distributed.layers.activation import sharded_normalized_relu
from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.layers.convolution import ShardedConv3d, conv3d
from patchreg.distributed.layers.doubling import doubled
from patchreg.distributed.layers.interpolation import interpolate
from patchreg.distributed.scope import Scope
from patchreg.networks.unet import Beside, ConvBlock
from patchreg.networks.upsampled_nearest import conv_upsampled_nearest


@stands_for(ConvBlock)
class ShardedConvBlock(ShardedLayer, ConvBlock):
    """Features that are upsampled and joined are never made, as in one process."""

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.run("join", x, skip)
        return out

    @property
    def can_join(self) -> bool:
        return type(self.conv) in (nn.Conv3d, ShardedConv3d)

    def sharded(self, x: Tensor, *others: Tensor, scope: Scope, total: int) -> Tensor:
        return self._finish(self.conv(x), scope)

    def sharded_join(self, x: Tensor, skip: Tensor, scope: Scope, total: int) -> Tensor:
        """``join`` of this rank's parts of features with ``total`` planes, and of others with twice as many."""
        coarse, fine = self.conv.weight.split([x.shape[1], skip.shape[1]], dim=1)
        half = fine.shape[-1] // 2
        out = conv3d(skip, fine, self.conv.bias, padding=half, scope=scope, total=2 * total)
        out.add_(doubled(partial(conv_upsampled_nearest, weight=coarse), x, (half + 1) // 2, scope, total))
        return self._finish(out, scope)

    def _finish(self, x: Tensor, scope: Scope) -> Tensor:
        slope = self.activation.negative_slope
        if isinstance(self.norm, nn.Identity):
            return F.leaky_relu_(x, slope)
        return sharded_normalized_relu(x, self.norm, slope, scope)


@stands_for(Beside)
class ShardedBeside(ShardedLayer, Beside):
    """Planes of the coarse features come to where the fine ones are."""

    def sharded(self, x: Tensor, *others: Tensor, scope: Scope, total: int) -> Tensor:
        (skip,) = others
        return torch.cat([interpolate(x, scale_factor=2, mode="nearest", scope=scope, total=total), skip], dim=1)
