"""Who holds which planes of every level of a network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from patchreg.distributed.partition import Partition

COARSEST = 2
"""Planes for every rank, below which a level is not split but held whole by all."""

ROOM = 8
"""Blocks of planes for every rank, as long as there are so many: slabs then differ by an eighth at most."""


@dataclass(frozen=True)
class Layout:
    """The partition of a network's input, and from it that of every tensor on the way, whatever its number of planes.

    Tensors of as many planes are split alike, so that what is added or joined needs no exchange: cuts are where the
    input's are, in proportion, and on multiples of a power of two where there are many planes, so that halving a level
    halves its slabs.

    Args:
        base: of the input.
    """

    base: Partition

    def of(self, total: int) -> Partition | None:
        """The partition of a tensor with ``total`` planes. None: too few to split, so every rank holds all of them."""
        return _of(self.base, total)

    def shares(self, total: int) -> Partition:
        """Who makes which of ``total`` planes, where they may be too few to be held so: some ranks may have none."""
        return _shares(self.base, total)


@lru_cache(maxsize=4096)
def _of(base: Partition, total: int) -> Partition | None:
    if total == base.total:
        return base
    found = None if total < COARSEST * base.ranks else _shares(base, total)
    return found if found is not None and min(found.sizes) > 0 else None


@lru_cache(maxsize=4096)
def _shares(base: Partition, total: int) -> Partition:
    block = 1
    while 2 * block * ROOM * base.ranks <= total:
        block *= 2
    cuts = [min(total, block * round(start * total / (base.total * block))) for start in base.starts]
    return Partition(tuple(b - a for a, b in pairwise([*cuts, total])), base.dim)
