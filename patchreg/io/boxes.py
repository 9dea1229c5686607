"""Boxes of voxels, and how a large one is gone through in small ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TypeAlias

from patchreg.types import Shape3

Range: TypeAlias = tuple[int, int]
"""From the first index up to, not including, the second."""

Box: TypeAlias = tuple[Range, Range, Range]
"""Ranges of voxels along the array dimensions (I, J, K)."""

AT_ONCE = 2**23
"""Voxels that are converted at a time: 64 MiB in the float64 that scaled integers become on their way."""


def slab_box(shape: Shape3, start: int, stop: int, dim: int) -> Box:
    """The planes ``start`` to ``stop`` along array dimension ``dim`` of an image."""
    i, j, k = ((start, stop) if d == dim else (0, n) for d, n in enumerate(shape))
    return i, j, k


def sizes(box: Box) -> Shape3:
    """Voxels along (I, J, K)."""
    i, j, k = (stop - start for start, stop in box)
    return i, j, k


def parts(box: Box, chunks: Shape3, channels: int = 1) -> Iterator[Box]:
    """Cut a box, along K and then J, where chunks of a file meet.

    Args:
        box: what is to be cut.
        chunks: voxels that the file has together along (I, J, K).
        channels: that are gone through together; a part has at most :data:`AT_ONCE` voxels of all, but whole chunks.
    """
    voxels = AT_ONCE // channels
    if min(sizes(box)) < 1:
        return
    i, j, _ = sizes(box)
    planes = chunks[2] * max(1, voxels // (i * j * chunks[2]))
    rows = chunks[1] * max(1, voxels // (i * chunks[1] * min(planes, sizes(box)[2])))
    yield from ((box[0], rj, rk) for rk, rj in itertools.product(_aligned(box[2], planes), _aligned(box[1], rows)))


def _aligned(whole: Range, step: int) -> Iterator[Range]:
    """Cuts at multiples of ``step``."""
    cuts = [whole[0], *range(whole[0] // step * step + step, whole[1], step), whole[1]]
    return itertools.pairwise(cuts)


def chunk_shape(shape: Shape3, dim: int, multiple: int, edge: int = 64) -> Shape3:
    """Chunks of about ``edge`` cubed voxels, whose planes along ``dim`` divide ``multiple``.

    Args:
        shape: of the image.
        dim: along which the image is cut into slabs.
        multiple: where it may be cut; 0 is anywhere.
        edge: of the chunk in voxels, as far as it is free.
    """
    divisors = [n for n in range(1, multiple + 1) if multiple % n == 0] or [min(edge, shape[dim])]
    thick = min(divisors, key=lambda n: abs(math.log(n / edge)))
    side = max(8, round(math.sqrt(edge**3 / thick) / 8) * 8)
    i, j, k = (thick if d == dim else min(side, n) for d, n in enumerate(shape))
    return i, j, k
