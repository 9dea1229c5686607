"""The U-Net that the convolutional networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.errors import InputError


class ConvBlock(nn.Module):
    """Convolution, optional instance norm, leaky ReLU."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel_size: int, stride: int, norm: bool, slope: float
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels_in, channels_out, kernel_size, stride, padding=kernel_size // 2)
        self.norm = nn.InstanceNorm3d(channels_out, affine=True) if norm else nn.Identity()
        self.activation = nn.LeakyReLU(slope)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation(self.norm(self.conv(x)))
        return out


class UNet(nn.Module):
    """An encoder of strided convolutions and a decoder of nearest upsampling with skips.

    Args:
        channels_in: channels of the input.
        encoder: width of every level, from full resolution down; each level halves the size.
        decoder: width of every upsampling step, from the coarsest up. As many as the encoder has steps gives full
            resolution; one fewer gives half, and so on.
        final: widths of further convolutions at the output's resolution.
        kernel_size: odd side of every kernel.
        norm: instance normalisation after every convolution.
        slope: of the leaky ReLU.

    Raises:
        InputError: widths or kernels that make no network.
    """

    def __init__(
        self,
        channels_in: int,
        encoder: Sequence[int],
        decoder: Sequence[int],
        final: Sequence[int] = (),
        kernel_size: int = 3,
        norm: bool = False,
        slope: float = 0.2,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f"kernel_size must be odd, got {kernel_size}")
        if len(encoder) < 2 or not 1 <= len(decoder) <= len(encoder) - 1:
            raise InputError(
                f"a U-Net with {len(encoder)} encoder levels takes 1 to {len(encoder) - 1} decoder steps, got {len(decoder)}"
            )
        if min(*encoder, *decoder, *final) < 1:
            raise InputError("every width must be positive")
        options = (norm, slope)
        widths = [channels_in, *encoder]
        self.down = nn.ModuleList(
            ConvBlock(a, b, kernel_size, 1 if level == 0 else 2, *options)
            for level, (a, b) in enumerate(zip(widths, encoder, strict=False))
        )
        self.up = nn.ModuleList()
        width = encoder[-1]
        for out, skip in zip(decoder, reversed(encoder[:-1]), strict=False):
            self.up.append(ConvBlock(width + skip, out, kernel_size, 1, *options))
            width = out
        self.final = nn.Sequential()
        for out in final:
            self.final.append(ConvBlock(width, out, kernel_size, 1, *options))
            width = out
        self.channels_out = width
        self.multiple = 2 ** (len(encoder) - 1)
        self.reduction = 2 ** (len(encoder) - 1 - len(decoder))
        if not norm:  # a third less time in half precision; instance norm loses more than that
            self.to(memory_format=torch.channels_last_3d)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, I, J, K), sizes multiples of ``multiple``, to (B, channels_out, I/r, J/r, K/r)."""
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = block(torch.cat([x, skips.pop()], dim=1))
        out: Tensor = self.final(x)
        return out


def pad_to_multiple(x: Tensor, multiple: int) -> tuple[Tensor, tuple[slice, slice, slice]]:
    """Pad (B, C, I, J, K) evenly with zeros to multiples, and the slices that cut the original out again."""
    padding: list[int] = []
    cut = []
    for size in x.shape[2:]:
        extra = -size % multiple
        padding = [extra // 2, extra - extra // 2, *padding]
        cut.append(slice(extra // 2, extra // 2 + size))
    return (F.pad(x, padding) if any(padding) else x), (cut[0], cut[1], cut[2])
