"""The decoder of TransMorph on slabs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.distributed.layers.activation import sharded_activated
from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.layers.doubling import doubled
from patchreg.distributed.layers.norm_convolution import sharded_norm_conv
from patchreg.distributed.layers.pooling import avg_pool3d
from patchreg.distributed.scope import Scope
from patchreg.networks.checkpointing import run_part
from patchreg.networks.decoder import Decoder, ImageStep, TokenStep, channels_first
from patchreg.networks.upsampled_linear import conv_upsampled_linear


@stands_for(TokenStep)
class ShardedTokenStep(ShardedLayer, TokenStep):
    """Statistics are of the whole volume, and upsampling reaches a plane to either side."""

    def sharded(self, x: Tensor, *others: Tensor, scope: Scope, total: int) -> Tensor:
        (tokens,) = others
        x = sharded_activated(x, scope, total) if self.raw else x
        upsampled = doubled(partial(F.interpolate, scale_factor=2, mode="trilinear"), x, 1, scope, total)
        joined = self.join(torch.cat([upsampled, channels_first(self.norm(tokens))], dim=1))
        out: Tensor = self.conv(sharded_activated(joined, scope, 2 * total))
        return out


@stands_for(ImageStep)
class ShardedImageStep(ShardedLayer, ImageStep):
    """The same; neither joined nor upsampled features are made."""

    def sharded(self, x: Tensor, *others: Tensor, scope: Scope, total: int) -> Tensor:
        (images,) = others
        if self.scale > 1:
            images = avg_pool3d(images, 3, self.scale, 1, scope=scope, total=2 * self.scale * total)
        dtype = self.precision(x)
        theirs, ours = self.weights()
        look = self.look.weight.to(dtype)
        convolve = partial(sharded_norm_conv, memory=self.memory, scope=scope, total=2 * total)
        out = convolve(images.to(dtype), ours.to(dtype), first=look)
        out.add_(run_part(self.memory, partial(self._doubled, scope=scope, total=total), x, theirs))
        return convolve(out, self.conv.weight.to(dtype))

    def _doubled(self, x: Tensor, weight: Tensor, scope: Scope, total: int) -> Tensor:
        x = sharded_activated(x, scope, total) if self.raw else x
        return doubled(partial(conv_upsampled_linear, weight=weight), x, 1, scope, total)


@stands_for(Decoder)
class ShardedDecoder(ShardedLayer, Decoder):
    """Its steps do what there is to do, but for the last convolution."""

    def forward(self, tokens: Sequence[Tensor], images: Tensor) -> Tensor:
        return Decoder.forward(self, tokens, images)

    def last(self, x: Tensor) -> Tensor:
        out: Tensor = self.run("last", x)
        return out

    def sharded_last(self, x: Tensor, scope: Scope, total: int) -> Tensor:
        """``last`` of this rank's part of a tensor with ``total`` planes."""
        assert self.flow.bias is not None
        out = sharded_norm_conv(x, self.flow.weight, self.memory, scope=scope, total=total)
        return out.add_(self.flow.bias.view(-1, 1, 1, 1))
