"""Planes of a split volume brought to the ranks that want them, and what was made of them brought back and added up.

Halos, the slabs that a sampler reads, and a change of partition are all this one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch.distributed as dist
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.distributed.partition import Partition, Span, overlap

Part: TypeAlias = tuple[int, int, int]
"""Another rank, and the planes, from the first up to the second, that go to it or come from it."""

Put: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Plan:
    """Which planes every rank wants of a volume.

    Args:
        partition: who holds them.
        wants: the planes that every rank wants, within the volume.
    """

    partition: Partition
    wants: tuple[Span, ...]

    def outgoing(self, rank: int) -> list[Part]:
        """What ``rank`` holds and others want."""
        return _shared(self.partition.bounds(rank), self.wants, rank)

    def incoming(self, rank: int) -> list[Part]:
        """What ``rank`` wants and others hold."""
        return _shared(self.wants[rank], self.partition.spans, rank)

    @cached_property
    def rounds(self) -> list[range]:
        """The distances from sender to receiver that are served together.

        Halos go in one round. Where a rank would have to hold more than another slab of messages on their way, each
        distance has a round of its own.
        """
        ranks = range(self.partition.ranks)
        most = max(sum(b - a for _, a, b in side(rank)) for rank in ranks for side in (self.outgoing, self.incoming))
        if most <= max(self.partition.sizes):
            return [range(1, self.partition.ranks)]
        return [range(distance, distance + 1) for distance in range(1, self.partition.ranks)]

    def traffic(self, rank: int, plane_bytes: int, back: bool = False) -> comm.Traffic:
        """What a rank sends to bring the planes where they are wanted, or, with ``back``, to bring them back."""
        parts = self.incoming(rank) if back else self.outgoing(rank)
        return comm.Traffic(plane_bytes * sum(b - a for _, a, b in parts), len(parts))


def _shared(span: Span, others: Sequence[Span], rank: int) -> list[Part]:
    found = [(other, *overlap(span, theirs)) for other, theirs in enumerate(others) if other != rank]
    return [(other, a, b) for other, a, b in found if a < b]


class Flight:
    """Messages on their way.

    Args:
        result: what :meth:`wait` returns.
        works: to wait for.
        sent: tensors that must live until then.
        landing: where to put what was received elsewhere.
        put: how.
    """

    def __init__(
        self,
        result: Tensor,
        works: Sequence[dist.Work] = (),
        sent: Sequence[Tensor] = (),
        landing: Sequence[tuple[Tensor, Tensor]] = (),
        put: Put = Tensor.copy_,
    ) -> None:
        self._result, self._works, self._sent, self._landing, self._put = result, works, sent, landing, put

    def wait(self) -> Tensor:
        """The result, complete."""
        comm.finish_messages(self._works)
        for place, received in self._landing:
            self._put(place, received)
        self._works, self._sent, self._landing = (), (), ()
        return self._result


def fetch(local: Tensor, plan: Plan, group: dist.ProcessGroup, margin: Span = (0, 0)) -> Flight:
    """Begin to bring every rank the planes that it wants.

    Args:
        local: this rank's slab (B, C, I, J, K), of any dtype; left as it is until the flight has landed.
        plan: the same on all ranks.
        group: theirs.
        margin: planes to leave room for before and after the wanted ones, with nothing written into them.

    Returns:
        A flight whose result is a new tensor of the wanted planes.
    """
    rank, dim = comm.rank_in(group), plan.partition.dim
    comm.wake(local.device, group)
    (low, high), start = plan.wants[rank], plan.partition.starts[rank]
    shape = list(local.shape)
    shape[dim] = margin[0] + high - low + margin[1]
    out = local.new_empty(shape)

    def place(first: int, end: int) -> Tensor:
        return out.narrow(dim, margin[0] + first - low, end - first)

    first, end = overlap((low, high), plan.partition.bounds(rank))
    if first < end:
        place(first, end).copy_(local.narrow(dim, first - start, end - first))
    sends = [(peer, local.narrow(dim, a - start, b - a)) for peer, a, b in plan.outgoing(rank)]
    receives = [(peer, place(a, b)) for peer, a, b in plan.incoming(rank)]
    return _fly(out, sends, receives, Tensor.copy_, plan.rounds, group)


def give_back(brought: Tensor, plan: Plan, into: Tensor, group: dist.ProcessGroup) -> Flight:
    """Begin to bring planes back to the ranks that hold them, who add them up: the adjoint of :func:`fetch`.

    Args:
        brought: for every plane that this rank wanted what is to be added to it.
        plan: the one by which it was fetched.
        into: this rank's slab, which is added to.
        group: the ranks.

    Returns:
        A flight whose result is ``into``.
    """
    rank, dim = comm.rank_in(group), plan.partition.dim
    comm.wake(brought.device, group)
    (low, high), start = plan.wants[rank], plan.partition.starts[rank]
    first, end = overlap((low, high), plan.partition.bounds(rank))
    if first < end:
        into.narrow(dim, first - start, end - first).add_(brought.narrow(dim, first - low, end - first))
    sends = [(peer, brought.narrow(dim, a - low, b - a)) for peer, a, b in plan.incoming(rank)]
    receives = [(peer, into.narrow(dim, a - start, b - a)) for peer, a, b in plan.outgoing(rank)]
    return _fly(into, sends, receives, Tensor.add_, plan.rounds, group)


def _fly(
    result: Tensor,
    sends: list[tuple[int, Tensor]],
    receives: list[tuple[int, Tensor]],
    put: Put,
    rounds: list[range],
    group: dist.ProcessGroup,
) -> Flight:
    """Send, and ``put`` what is received where it belongs; what is copied to one piece of memory arrives there at once."""
    rank, ranks = comm.rank_in(group), comm.size_of(group)
    flight = Flight(result)
    for distances in rounds:
        flight.wait()
        out = [(t.contiguous(), peer) for peer, t in sends if (peer - rank) % ranks in distances]
        into, landing = [], []
        for peer, place in receives:
            if (rank - peer) % ranks in distances:
                direct = put is Tensor.copy_ and place.is_contiguous()
                buffer = place if direct else place.new_empty(place.shape)
                into.append((buffer, peer))
                landing += [] if direct else [(place, buffer)]
        flight = Flight(result, comm.start_messages(out, into, group), [t for t, _ in out], landing, put)
    return flight
