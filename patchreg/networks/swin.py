"""The encoder of TransMorph: a Swin transformer in three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn

from patchreg.errors import InputError
from patchreg.networks.attention import WindowAttention, split
from patchreg.networks.checkpointing import run_part
from patchreg.networks.reversible import ReversibleBlock, ReversibleSequence
from patchreg.types import Activations, Shape3

PATCH = 4
"""Voxels of a token along each axis, at the first level."""


@dataclass(frozen=True)
class SwinSize:
    """How large a Swin encoder is.

    Args:
        embed: channels of a token at the first level; each further level has twice as many.
        depths: blocks of every level.
        heads: of attention, of every level.
        drop_path: probability with which the last block's branches are dropped in training; it grows linearly from 0
            at the first.

    Raises:
        InputError: numbers that make no encoder.
    """

    embed: int
    depths: Sequence[int]
    heads: Sequence[int]
    drop_path: float = 0.3

    def __post_init__(self) -> None:
        if not self.depths or len(self.depths) != len(self.heads) or min(*self.depths, *self.heads, self.embed) < 1:
            raise InputError(
                f"depths and heads must be as many positive numbers, got depths {self.depths} and heads {self.heads}"
            )
        for level, heads in enumerate(self.heads):
            if (self.embed << level) % heads:
                raise InputError(f"{heads} heads do not divide the {self.embed << level} channels of level {level + 1}")
        if not 0 <= self.drop_path < 1:
            raise InputError(f"drop_path must be from 0 to below 1, got {self.drop_path}")


class SwinBlock(nn.Module):
    """``y = x + f(x)``, ``z = y + g(y)``, with the branches of :func:`branches`."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        out: Tensor = x + self.mlp(x)
        return out


class SwinStage(nn.Module):
    """The blocks of one level, of which every second one has shifted windows.

    With ``reversible`` they work on two streams that both start as the input, ``y1 = x1 + f(x2)`` and
    ``y2 = x2 + g(y1)``, and the output is the streams' mean.

    Args:
        dim: channels of a token.
        heads: of attention.
        window: tokens of a window along the axes.
        drop_path: of every block.
        memory: what is kept for the backward pass.
        reversible: see above.

    References:
        Mangalam et al. 2022, arXiv:2302.04869, section 3, for the streams.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Shape3,
        drop_path: Sequence[float],
        memory: Activations = "stored",
        reversible: bool = False,
    ) -> None:
        super().__init__()
        self.memory = memory
        parts = [branches(dim, heads, window, bool(index % 2), rate) for index, rate in enumerate(drop_path)]
        self.sequence = self.blocks = None
        if reversible:
            self.sequence = ReversibleSequence([ReversibleBlock(f, g) for f, g in parts], memory, dim=0)
        else:
            self.blocks = nn.ModuleList(SwinBlock(f, g) for f, g in parts)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, J, K, dim) to the same shape."""
        if self.sequence is not None:
            one, two = self.sequence(torch.cat([x, x])).chunk(2)
            return (one + two) / 2
        assert self.blocks is not None
        for block in self.blocks:
            x = run_part(self.memory, block, x)
        return x


class PatchMerging(nn.Module):
    """Eight neighbouring tokens to one of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, J, K, C) to (B, I/2, J/2, K/2, 2C), sizes rounded up."""
        i, j, k = (n % 2 for n in x.shape[1:4])
        if i or j or k:
            x = F.pad(x, (0, 0, 0, k, 0, j, 0, i))
        batch, *grid, _ = x.shape
        out: Tensor = self.reduction(self.norm(split(x, (2, 2, 2)).flatten(1)))
        return out.view(batch, *(n // 2 for n in grid), -1)


class SwinEncoder(nn.Module):
    """From images to tokens of several levels: the first at a quarter of the resolution, each next at half of the last.

    Args:
        channels: of the input.
        size: widths and depths.
        window: tokens of a window along the axes, the same at every level.
        memory: what is kept for the backward pass.
        reversible: of the levels' blocks, see :class:`SwinStage`.

    Raises:
        InputError: a window that is none.

    References:
        Liu et al. 2021, arXiv:2103.14030; Chen et al. 2022, arXiv:2111.10480, for three axes.
    """

    def __init__(
        self,
        channels: int,
        size: SwinSize,
        window: Sequence[int],
        memory: Activations = "stored",
        reversible: bool = False,
    ) -> None:
        super().__init__()
        if len(window) != 3 or min(window) < 1:
            raise InputError(f"window must be three positive numbers of tokens, got {tuple(window)}")
        a, b, c = window
        self.window, self.memory = (a, b, c), memory
        levels = len(size.depths)
        self.multiple = PATCH * 2 ** (levels - 1)
        self.widths = [size.embed << level for level in range(levels)]
        blocks = sum(size.depths)
        rates = [size.drop_path * block / max(1, blocks - 1) for block in range(blocks)]
        self.embedding = nn.Conv3d(channels, size.embed, PATCH, PATCH)
        self.norm = nn.LayerNorm(size.embed)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        for level, (depth, heads, width) in enumerate(zip(size.depths, size.heads, self.widths, strict=True)):
            if level:
                self.merges.append(PatchMerging(width // 2))
            own, rates = rates[:depth], rates[depth:]
            self.stages.append(SwinStage(width, heads, self.window, own, memory, reversible))
        self.apply(_initialise)

    def check_size(self, shape: Sequence[int]) -> None:
        """Refuse images on which a window does not fit.

        Args:
            shape: voxels of an image, (I, J, K), before it is padded.

        Raises:
            InputError: see above.
        """
        tokens = tuple((n + -n % self.multiple) // PATCH for n in shape)
        if any(n < w for n, w in zip(tokens, self.window, strict=True)):
            raise InputError(
                f"images of shape {tuple(shape)}, padded to multiples of {self.multiple}, give a grid of {tokens} tokens, "
                f"on which the window of {self.window} tokens does not fit: use larger patches, or set a smaller window"
            )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, channels, I, J, K), sizes multiples of ``multiple``, to the levels' tokens (B, I/r, J/r, K/r, width)."""
        x = run_part(self.memory, self._embed, x)
        tokens: list[Tensor] = []
        for level, stage in enumerate(self.stages):
            if level:
                x = run_part(self.memory, self.merges[level - 1], x)
            x = stage(x)
            tokens.append(x)
        return tokens

    def _embed(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.embedding(x).permute(0, 2, 3, 4, 1).contiguous())
        return out


def branches(dim: int, heads: int, window: Shape3, shifted: bool, drop_path: float) -> tuple[nn.Module, nn.Module]:
    """What a block adds: attention, and two layers on each token; both normalised before and dropped at random."""
    attention = WindowAttention(dim, heads, window, shifted)
    mlp = Mlp(dim, 4 * dim)
    f, g = (nn.Sequential(nn.LayerNorm(dim), part, DropPath(drop_path)) for part in (attention, mlp))
    return f, g


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
