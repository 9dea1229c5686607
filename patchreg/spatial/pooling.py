"""Blocks of voxels that become one: where they lie, and their means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``factor`` voxels along one dimension, evenly about the middle.

    Blocks that reach over the edge average what is there; where an odd number of voxels cannot be shared out evenly among
    even blocks, neighbours are averaged first; up to half a block is cut off each edge otherwise.

    Args:
        size: voxels.
        factor: voxels of a block, at most ``size``.
    """

    size: int
    factor: int

    @property
    def paired(self) -> bool:
        """Whether neighbours are averaged first: a block is then of pairs ``(i, i + 1)``."""
        return self.factor % 2 == 0 and self.size % 2 == 1 and self.size > 1

    @property
    def items(self) -> int:
        """Voxels, or pairs."""
        return self.size - int(self.paired)

    @property
    def first(self) -> int:
        """The item that the first block starts with: negative where it reaches over the edge, positive where some are cut
        off."""
        missing = -self.items % self.factor
        if missing % 2 == 0:
            return -(missing // 2)
        return (self.items % self.factor) // 2 if self.items > self.factor else 0

    @property
    def count(self) -> int:
        """How many there are."""
        return math.ceil((self.items - 2 * max(self.first, 0) + max(-self.first, 0)) / self.factor)

    @property
    def start(self) -> float:
        """The centre of the first block, in voxels."""
        return self.first + (self.factor - 1) / 2 + 0.5 * self.paired

    def reads(self, low: int, high: int) -> tuple[int, int]:
        """The voxels, from the first up to the second, that blocks ``low`` up to ``high`` are made of."""
        kept = self.items - max(self.first, 0)
        begin, end = self.first + low * self.factor, self.first + high * self.factor
        return max(begin, 0), min(end, kept) + int(self.paired)

    def mean(self, x: Tensor, dim: int, low: int = 0, high: int | None = None) -> Tensor:
        """The means of blocks ``low`` up to ``high`` along ``dim`` of (B, C, I, J, K), given the voxels that they read."""
        high = self.count if high is None else high
        begin, end = self.reads(low, high)
        if x.shape[dim] == self.size and (begin, end) != (0, self.size):
            x = x.narrow(dim, begin, end - begin)
        if self.paired:
            x = (x.narrow(dim, 0, x.shape[dim] - 1) + x.narrow(dim, 1, x.shape[dim] - 1)) / 2
        if self.factor == 1:
            return x
        if high - low == 1:
            return x.mean(dim=dim, keepdim=True)
        kernel, padding = [1, 1, 1], [0, 0, 0]
        kernel[dim - 2] = self.factor
        padding[dim - 2] = max(0, -(self.first + low * self.factor))
        return F.avg_pool3d(x, kernel, padding=padding, count_include_pad=False, ceil_mode=True)
