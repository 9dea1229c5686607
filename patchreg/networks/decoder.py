"""The decoder of TransMorph: from tokens up to a flow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.networks.checkpointing import run_part
from patchreg.networks.normconv import activated, norm_conv
from patchreg.networks.upsampled_linear import conv_upsampled_linear
from patchreg.types import Activations


class Decoder(nn.Module):
    """Steps that double the resolution: first with the tokens of an encoder's level each, then with the images.

    Between steps go the answers of convolutions; what takes them normalises them, so that nothing else need be kept.

    Args:
        widths: channels of the encoder's levels, from the first, at a quarter of the resolution, down.
        images: channels of the images.
        final: channels at full resolution.
        reduction: 1, 2 or 4: the flow has full resolution, a half or a quarter of it.
        memory: what is kept for the backward pass: unless all is, the inputs of steps, and of the finest step, which needs
            the most, the answers of its convolutions.

    References:
        Chen et al. 2022, arXiv:2111.10480, section 3.
    """

    def __init__(self, widths: Sequence[int], images: int, final: int, reduction: int, memory: Activations) -> None:
        super().__init__()
        self.memory = memory
        self.norm = nn.LayerNorm(widths[-1])
        self.steps = nn.ModuleList()
        width = widths[-1]
        for out in reversed(widths[:-1]):
            self.steps.append(TokenStep(width, out, raw=bool(self.steps)))
            width = out
        for out, scale in ((max(1, widths[0] // 2), 2), (final, 1)):
            if scale >= reduction:
                policy: Activations = memory if scale == reduction else "stored"
                self.steps.append(ImageStep(width, out, images, scale, policy, raw=bool(self.steps)))
                width = out
        self.flow = nn.Conv3d(width, 3, 3, padding=1)
        nn.init.normal_(self.flow.weight, std=1e-5)
        nn.init.zeros_(self.flow.bias)  # type: ignore[arg-type]
        self.reduction = reduction

    def forward(self, tokens: Sequence[Tensor], images: Tensor) -> Tensor:
        """Tokens by level and the images (B, images, I, J, K) to the flow (B, 3, I/r, J/r, K/r), float32 at least."""
        *skips, deepest = tokens
        x = channels_first(self.norm(deepest))
        for step in self.steps:
            if isinstance(step, TokenStep):
                x = run_part(self.memory, step, x, skips.pop())
            else:
                x = run_part("stored" if step.scale == self.reduction else self.memory, step, x, images)
        with torch.autocast(x.device.type, enabled=False):
            return self.last(x)

    def last(self, x: Tensor) -> Tensor:
        """The answer of the finest step to the flow."""
        assert self.flow.bias is not None
        return norm_conv(x, self.flow.weight, self.memory).add_(self.flow.bias.view(-1, 1, 1, 1))


class TokenStep(nn.Module):
    """Upsample, join with the tokens of the encoder's level, convolve twice.

    Args:
        channels_in: of the features to upsample.
        channels_out: of the answer, and of the tokens.
        raw: whether the features are the answer of a convolution.
    """

    def __init__(self, channels_in: int, channels_out: int, raw: bool) -> None:
        super().__init__()
        self.raw = raw
        self.norm = nn.LayerNorm(channels_out)
        self.join = _conv(channels_in + channels_out, channels_out)
        self.conv = _conv(channels_out, channels_out)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, channels_in, I, J, K) and (B, 2I, 2J, 2K, channels_out) to (B, channels_out, 2I, 2J, 2K)."""
        x = activated(x) if self.raw else x
        x = F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=False)
        out: Tensor = self.conv(activated(self.join(torch.cat([x, channels_first(self.norm(tokens))], dim=1))))
        return out


class ImageStep(nn.Module):
    """The same with features of the images themselves, which one convolution makes.

    The joined features would be the largest tensor of the network. They are never made: the convolution of the upsampled
    ones is :func:`patchreg.networks.upsampled_linear.conv_upsampled_linear`, and that of the images' is added to it.

    Args:
        channels_in: of the features to upsample.
        channels_out: of the answer, and of the images' features.
        images: channels of the images.
        scale: 1, or 2 where the step ends at half of the images' resolution.
        memory: what is kept for the backward pass.
        raw: whether the features are the answer of a convolution.
    """

    def __init__(
        self, channels_in: int, channels_out: int, images: int, scale: int, memory: Activations, raw: bool
    ) -> None:
        super().__init__()
        self.scale, self.memory, self.raw = scale, memory, raw
        self.join = _conv(channels_in + channels_out, channels_out)
        self.look = _conv(images, channels_out)
        self.conv = _conv(channels_out, channels_out)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        """(B, channels_in, I, J, K) and the images (B, images, 2sI, 2sJ, 2sK) to (B, channels_out, 2I, 2J, 2K)."""
        if self.scale > 1:
            images = F.avg_pool3d(images, 3, self.scale, padding=1)
        dtype, (theirs, ours) = self.precision(x), self.weights()
        out = norm_conv(images.to(dtype), ours.to(dtype), self.memory, self.look.weight.to(dtype))
        out.add_(run_part(self.memory, self._upsampled, x, theirs))
        return norm_conv(out, self.conv.weight.to(dtype), self.memory)

    def precision(self, x: Tensor) -> torch.dtype:
        """Of the convolutions."""
        return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype

    def weights(self) -> tuple[Tensor, Tensor]:
        """Of the joined features those of the upsampled ones, and those of the images'."""
        own = self.look.out_channels
        theirs, ours = self.join.weight.split([self.join.in_channels - own, own], dim=1)
        return theirs, ours

    def _upsampled(self, x: Tensor, weight: Tensor) -> Tensor:
        return conv_upsampled_linear(activated(x) if self.raw else x, weight)


def channels_first(tokens: Tensor) -> Tensor:
    """(B, I, J, K, C) to (B, C, I, J, K)."""
    return tokens.permute(0, 4, 1, 2, 3).contiguous()


def _conv(channels_in: int, channels_out: int) -> nn.Conv3d:
    return nn.Conv3d(channels_in, channels_out, 3, padding=1, bias=False)
