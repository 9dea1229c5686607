"""The U-Net that the convolutional networks share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.errors import InputError
from patchreg.networks.activation import normalized_relu
from patchreg.networks.checkpointing import check_policy, run_part
from patchreg.networks.reversible import ReversibleConvBlock, ReversibleSequence
from patchreg.networks.slabs import THICKNESS, Slabbed, in_slabs
from patchreg.networks.surroundings import kind
from patchreg.networks.upsampled_nearest import conv_upsampled_nearest
from patchreg.types import Activations


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
        """(B, channels_in, I, J, K) to (B, channels_out, I, J, K), or half the size where the stride is 2."""
        return self._activated(self.conv(x))

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """The same of features of half the size, upsampled by nearest neighbours, beside features of full size.

        Only where :attr:`can_join` says so.

        Args:
            x: (B, C, I, J, K).
            skip: (B, channels_in - C, 2I, 2J, 2K).

        Returns:
            (B, channels_out, 2I, 2J, 2K).
        """
        weight, width = self.conv.weight, x.shape[1]
        out = conv_upsampled_nearest(x, weight[:, :width], self.conv.bias)
        return self._activated(out.add_(F.conv3d(skip, weight[:, width:], padding=self.conv.padding)))

    @property
    def can_join(self) -> bool:
        """Whether the convolution has not been replaced, by one that wants all features in one tensor."""
        return kind(self.conv) is nn.Conv3d

    def _activated(self, x: Tensor) -> Tensor:
        """In place, because a convolution does not need its own output for the backward pass."""
        slope = self.activation.negative_slope
        return F.leaky_relu_(x, slope) if isinstance(self.norm, nn.Identity) else normalized_relu(x, self.norm, slope)


class Beside(nn.Module):
    """Features upsampled by nearest neighbours beside features of twice their size, in one tensor."""

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(B, C, I, J, K) and (B, c, 2I, 2J, 2K) to (B, C + c, 2I, 2J, 2K)."""
        return torch.cat([F.interpolate(x, scale_factor=2, mode="nearest"), skip], dim=1)


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
        memory: what is kept for the backward pass: ``"stored"``, all; ``"checkpoint"``, what enters convolutions, and
            in reversible stacks blocks, while without norm and stacks nothing of full resolution is kept, which is made
            slab by slab; ``"reversible"``, of a reversible stack the output only.
        reversible: blocks of a reversible stack after every level of the encoder and step of the decoder. 0: none.

    Raises:
        InputError: widths or kernels that make no network, or a policy that it cannot follow.
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
        memory: Activations = "stored",
        reversible: int = 0,
    ) -> None:
        super().__init__()
        _check_sizes(encoder, decoder, final, kernel_size, reversible)
        check_policy(memory, reversible > 0, type(self).__name__)
        self.memory = memory
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
        self.down_stacks, self.up_stacks = (
            nn.ModuleList(
                ReversibleSequence(
                    [ReversibleConvBlock(width // 2, kernel_size, *options) for _ in range(reversible)], memory
                )
                for width in (side if reversible else ())
            )
            for side in (encoder, decoder)
        )
        self.beside = Beside()
        self.channels_out = width
        self.multiple = 2 ** (len(encoder) - 1)
        self.reduction = 2 ** (len(encoder) - 1 - len(decoder))
        if not norm:  # a third less time in half precision; instance norm loses more than that
            self.to(memory_format=torch.channels_last_3d)

    def forward(self, x: Tensor, last: nn.Module | None = None) -> Tensor:
        """From images to features, or to what one further convolution makes of them.

        Args:
            x: (B, channels_in, I, J, K), sizes multiples of ``multiple``.
            last: a convolution that gives few channels, computed in full precision.

        Returns:
            (B, channels_out, I/r, J/r, K/r), or with the channels of ``last``.
        """
        slabbed = self._slabbed(x, last)
        skips, levels = [], list(self.down)
        if slabbed:
            skips, levels = [x], levels[2:]
            x = self.first_levels(x)
            skips.append(x)
        for block in levels:
            x = run_part(self.memory, block, x)
            if self.down_stacks:
                x = self.down_stacks[len(skips)](x)
            skips.append(x)
        skips.pop()
        for step, block in enumerate(self.up):
            if slabbed and len(skips) == 1:
                return self.full_resolution(x, skips.pop(), last)
            x = run_part(self.memory, partial(self._join, block), x, skips.pop())
            if self.up_stacks:
                x = self.up_stacks[step](x)
        for block in self.final:
            x = run_part(self.memory, block, x)
        if last is None:
            return x
        return run_part("stored" if x.dtype.itemsize >= 4 else self.memory, partial(_in_full_precision, last), x)

    def _join(self, block: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
        """A step of the decoder; a block that has been replaced wants both in one tensor."""
        out: Tensor = (
            block.join(x, skip) if isinstance(block, ConvBlock) and block.can_join else block(self.beside(x, skip))
        )
        return out

    def _slabbed(self, x: Tensor, last: nn.Module | None) -> bool:
        """Whether what works at full resolution runs slab by slab."""
        wanted = self.memory == "checkpoint" and not self.down_stacks and torch.is_grad_enabled()
        return wanted and self.can_slab(last) and self.worth_slabs(x, last)

    def can_slab(self, last: nn.Module | None) -> bool:
        """Whether full resolution takes nothing but convolutions: no norm, which needs all of a volume."""
        blocks = [*self.down[:2], self.up[-1], *self.final]
        plain = all(kind(block) is ConvBlock and kind(block.conv) is nn.Conv3d for block in blocks)
        few = last is None or kind(last) is nn.Conv3d
        return plain and few and all(isinstance(block.norm, nn.Identity) for block in blocks)

    def worth_slabs(self, x: Tensor, last: nn.Module | None) -> bool:
        """Whether images are large enough."""
        return x.shape[2] > THICKNESS

    def first_levels(self, x: Tensor) -> Tensor:
        """Slab by slab the images to the second level: the first level's features are not kept."""
        return in_slabs(self.first_part(), x)

    def first_part(self) -> Slabbed:
        """What :meth:`first_levels` runs."""
        full, half = self.down[:2]

        def run(images: Tensor) -> Tensor:
            out: Tensor = half(full(images))
            return out

        return Slabbed(run, _parameters(full, half), [2], (_reach(full, half) + 1) // 2)

    def full_resolution(self, x: Tensor, images: Tensor, last: nn.Module | None) -> Tensor:
        """The second level's features and the images to the result; the first level's features are made again."""
        return in_slabs(self.last_part(last), x, images)

    def last_part(self, last: nn.Module | None) -> Slabbed:
        """What :meth:`full_resolution` runs."""
        first, join = self.down[0], self.up[-1]
        used = [first, join, *self.final, *([last] if last is not None else [])]

        def run(x: Tensor, images: Tensor) -> Tensor:
            x = self.final(self._join(join, x, first(images)))
            return x if last is None else _in_full_precision(last, x)

        reach = _reach(*used)
        return Slabbed(run, _parameters(*used), [0.5, 1], reach + reach % 2)


def _reach(*parts: nn.Module) -> int:
    """Voxels to either side that the answer of convolutions in a row depends on."""
    convs = [m for part in parts for m in part.modules() if isinstance(m, nn.Conv3d)]
    return sum(conv.kernel_size[0] // 2 for conv in convs)


def _parameters(*parts: nn.Module) -> list[Tensor]:
    return [p for part in parts for p in part.parameters()]


def _in_full_precision(conv: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = conv(x.to(torch.promote_types(x.dtype, torch.float32)))
    return out


def _check_sizes(
    encoder: Sequence[int], decoder: Sequence[int], final: Sequence[int], kernel_size: int, reversible: int
) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"kernel_size must be odd, got {kernel_size}")
    if len(encoder) < 2 or not 1 <= len(decoder) <= len(encoder) - 1:
        raise InputError(
            f"a U-Net with {len(encoder)} encoder levels takes 1 to {len(encoder) - 1} decoder steps, got {len(decoder)}"
        )
    if min(*encoder, *decoder, *final) < 1:
        raise InputError("every width must be positive")
    if reversible < 0:
        raise InputError(f"reversible is a number of blocks, got {reversible}")
    if reversible and (odd := [width for width in (*encoder, *decoder) if width % 2]):
        raise InputError(f"reversible blocks split channels into halves: make every width even, got {odd[0]}")
