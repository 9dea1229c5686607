"""Slabs of an image on their way around all ranks, so that each sees the whole image, one slab at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.distributed.exchange import Plan, fetch, give_back
from patchreg.distributed.partition import Partition, Span, clip, overlap, total_planes


@dataclass(frozen=True)
class Ring:
    """How slabs travel. Whatever lies between two planes is sampled from the slab that holds the lower one.

    So a slab takes along the planes next to it: that above its last, and one more on both sides, because a position right
    on a plane may be rounded to either side of it, and its slope is that towards a neighbour.

    Args:
        partition: of the image.
        pairs: whether slabs begin at even planes, for who rounds halves to even ones.
    """

    partition: Partition
    pairs: bool = False

    @cached_property
    def plan(self) -> Plan:
        """The planes of every rank's slab on the way."""
        spans: list[Span] = []
        for start, stop in self.partition.spans:
            low = start - 1 - ((start - 1) % 2 if self.pairs else 0)
            spans.append(clip((low, stop + 2), self.partition.total) if start < stop else (start, stop))
        return Plan(self.partition, tuple(spans))

    def first(self, rank: int) -> int:
        """The first plane of a rank's slab on the way."""
        return self.plan.wants[rank][0]

    def reads(self, rank: int, wants: Span) -> bool:
        """Whether who wants these planes reads that rank's slab."""
        low, high = overlap(self.partition.bounds(rank), wants)
        return low < high

    def depart(self, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This rank's slab as it goes on its way."""
        return fetch(local, self.plan, group).wait()

    def arrive(self, gradient: Tensor, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This rank's part of the gradient, from that of the slab as it went on its way; of the shape of ``local``."""
        return give_back(gradient, self.plan, gradient.new_zeros(local.shape), group).wait()

    def shape(self, like: Tensor, rank: int) -> list[int]:
        """Of a rank's slab on the way."""
        low, high = self.plan.wants[rank]
        return [high - low if dim == self.partition.dim else size for dim, size in enumerate(like.shape)]

    def travel(self, departing: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
        """Every rank's slab in turn, this one's first; the next comes while one is used: two exist at one time.

        Yields:
            The rank that holds it, and the slab.
        """
        rank, ranks = comm.rank_in(group), comm.size_of(group)
        slab = departing
        del departing  # or it would live until the end
        for step in range(ranks - 1):
            coming = slab.new_empty(self.shape(slab, (rank - step - 1) % ranks))
            works = self.pass_on(slab, coming, group)
            yield (rank - step) % ranks, slab
            comm.finish_messages(works)
            slab = coming
        yield (rank + 1) % ranks, slab

    @staticmethod
    def pass_on(slab: Tensor, coming: Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
        """Begin to send one slab to the next rank, and to receive another from the one before."""
        rank, ranks = comm.rank_in(group), comm.size_of(group)
        comm.wake(slab.device, group)
        sends = [(slab, (rank + 1) % ranks)] if slab.numel() else []
        receives = [(coming, (rank - 1) % ranks)] if coming.numel() else []
        return comm.start_messages(sends, receives, group)

    def traffic(self, rank: int, plane_bytes: int, back: bool = False) -> comm.Traffic:
        """What a rank sends to let all slabs go round, or, with ``back``, to let gradients come home."""
        ranks = self.partition.ranks
        steps = range(1, ranks) if back else range(ranks - 1)
        passed = [self.plan.wants[(rank - step) % ranks] for step in steps]
        round_trip = comm.Traffic(plane_bytes * total_planes(passed), sum(a < b for a, b in passed))
        return round_trip + self.plan.traffic(rank, plane_bytes, back)
