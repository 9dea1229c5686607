"""How the fused kernel of ``csrc/cuda/lncc.cu`` divides a volume among the blocks of a device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

_TOGETHER = 4  # slices that the kernel takes a turn: it does whole turns


class Mode(IntEnum):
    """What the kernel computes beside the sum: nothing or the map, the gradient of one image, or of both."""

    VALUE = 0
    GRADIENT = 1
    GRADIENTS = 2


@dataclass(frozen=True)
class Tile:
    """``LnccTile`` of the kernel, which has the same numbers: the columns that a block marches through the slices."""

    radius: int
    mode: Mode
    masked: bool

    threads = 384

    @property
    def out(self) -> tuple[int, int]:
        """Rows and columns of the result."""
        return (24, 32) if self.mode is Mode.VALUE else (16, 24)

    @property
    def warm_up(self) -> int:
        """Slices that a block reads beyond those that it gives."""
        return 2 * self.radius if self.mode is Mode.VALUE else 4 * self.radius

    @property
    def shared_bytes(self) -> int:
        """Of dynamic shared memory."""
        radius, (out_j, out_k) = self.radius, self.out
        halo = 0 if self.mode is Mode.VALUE else radius
        field_k, field_j = out_k + 2 * halo, out_j + 2 * halo
        segments, read = (field_k + 3) // 4, (4 + 2 * radius + 3) // 4 * 4
        raw_j, raw_pitch = field_j + 2 * radius, 4 * (segments - 1) + read
        raws, parts = (3, 6) if self.masked else (2, 5)
        fields = {Mode.VALUE: 0, Mode.GRADIENT: 3, Mode.GRADIENTS: 5}[self.mode]
        floats = raws * raw_j * raw_pitch + parts * raw_j * 4 * segments
        slots = 4 if radius > 1 else 0
        return 4 * (floats + fields * (field_j * (out_k - 4 + read) + field_j * out_k + slots * self.threads))

    def tiles(self, height: int, width: int) -> int:
        """How many cover a slice."""
        return -(-height // self.out[0]) * -(-width // self.out[1])


@lru_cache(256)
def chunk_length(depth: int, columns: int, warm_up: int, processors: int) -> int:
    """Into chunks of how many slices the march is split, so that the device is done soonest.

    Args:
        depth: slices of the volume.
        columns: tiles of all planes together.
        warm_up: slices that a chunk reads beyond its own.
        processors: blocks that the device runs at a time.
    """
    lengths = {-(-depth // chunks) for chunks in range(1, depth + 1)}

    def cost(length: int) -> int:
        blocks = columns * -(-depth // length)
        return -(-blocks // processors) * -(-(length + warm_up) // _TOGETHER)

    return min(sorted(lengths, reverse=True), key=cost)
