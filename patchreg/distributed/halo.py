"""Slabs extended by the planes beyond their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.distributed.agreement import agreement
from patchreg.distributed.communication import Group
from patchreg.distributed.exchange import Flight, Plan, fetch, give_back
from patchreg.distributed.partition import Partition, Span, clip, widened
from patchreg.errors import InputError

Outside: TypeAlias = Literal["zeros", "border", "nothing"]


def exchange_halo(
    local: Tensor,
    partition: Partition,
    widths: Span | Sequence[Span],
    group: Group = None,
    outside: Outside = "zeros",
    check: bool = True,
) -> Tensor:
    """This rank's slab with planes of its neighbours on either side, however far away those are.

    The gradient of every plane is added up on the rank that holds it. It needs no more memory than the planes that are
    exchanged; the extended slab is a copy.

    Args:
        local: this rank's slab, (B, C, I, J, K), of any dtype.
        partition: of the volume.
        widths: planes (left, right), or those of every rank, as :func:`halo_widths` gives them; negative ones cut planes
            off. The same pair for all leaves empty slabs empty.
        group: the ranks.
        outside: what lies beyond the volume: ``"zeros"``, ``"border"`` for the nearest plane, or ``"nothing"``: slabs
            end with the volume.
        check: whether the ranks first make sure that they agree. Without, a call has no collective part, and costs no
            more than its messages; for layers behind one that was checked.

    Returns:
        (B, C, I, J, K) with ``left + size + right`` planes, fewer with ``"nothing"``.

    Raises:
        InputError: a slab that is not the partition's, widths that leave less than nothing, or ranks that disagree.
    """
    return start_halo(local, partition, widths, group, outside, check).wait()


def start_halo(
    local: Tensor,
    partition: Partition,
    widths: Span | Sequence[Span],
    group: Group = None,
    outside: Outside = "zeros",
    check: bool = True,
) -> HaloInFlight:
    """Begin :func:`exchange_halo`, so that something else can be computed before the result is waited for.

    ``local`` must not be written to until then. All ranks must start, and wait for, their exchanges in one order.
    """
    ranks = comm.process_group(group)
    rank = comm.rank_in(ranks)
    with agreement("a halo exchange", ranks, check) as facts:
        extent = _extent(partition, _spans(partition, widths), outside)
        if comm.size_of(ranks) != partition.ranks:
            raise InputError(f"the partition is for {partition.ranks} ranks, the group has {comm.size_of(ranks)}")
        partition.check("local", local, rank)
        facts.same(partition=partition, spans=extent.spans, outside=outside)
        facts.tensor("local", local, partition.dim)
    flight = fetch(local.detach(), extent.plan, ranks, extent.margin(rank))
    return HaloInFlight(local, flight, extent, ranks)


def halo_plan(partition: Partition, widths: Span | Sequence[Span]) -> Plan:
    """The planes that :func:`exchange_halo` brings to every rank."""
    return _extent(partition, _spans(partition, widths), "zeros").plan


class HaloInFlight:
    """A halo exchange that was begun by :func:`start_halo`."""

    def __init__(self, local: Tensor, flight: Flight, extent: _Extent, group: dist.ProcessGroup) -> None:
        self._local, self._flight, self._extent, self._group = local, flight, extent, group

    def wait(self) -> Tensor:
        """The extended slab; see :func:`exchange_halo`."""
        out: Tensor = _Extend.apply(self._local, self._flight, self._extent, self._group)
        return out


@dataclass(frozen=True)
class _Extent:
    """The planes of every rank's extended slab, which may lie outside the volume."""

    partition: Partition
    spans: tuple[Span, ...]
    outside: Outside

    @cached_property
    def plan(self) -> Plan:
        """What is brought, from within the volume."""
        return Plan(self.partition, tuple(clip(span, self.partition.total) for span in self.spans))

    def margin(self, rank: int) -> Span:
        """Planes outside the volume, before and after those that are brought."""
        if self.outside == "nothing":
            return 0, 0
        (low, high), (first, end) = self.spans[rank], self.plan.wants[rank]
        return (first - low, high - end) if first < end else (0, high - low)


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, flight: Flight, extent: _Extent, group: dist.ProcessGroup) -> Tensor:
        ctx.extent, ctx.group, ctx.shape = extent, group, local.shape
        out = flight.wait()
        for margin, edge in _margins(out, extent, comm.rank_in(group)):
            if extent.outside == "border" and edge is not None:
                margin.copy_(edge)
            else:
                margin.zero_()
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        extent, rank, dim = ctx.extent, comm.rank_in(ctx.group), ctx.extent.partition.dim
        left, right = extent.margin(rank)
        if extent.outside == "border" and (left or right):
            upstream = upstream.clone()
            for margin, edge in _margins(upstream, extent, rank):
                assert edge is not None
                edge.add_(margin.sum(dim=dim, keepdim=True))
        inner = upstream.narrow(dim, left, upstream.shape[dim] - left - right)
        grad = upstream.new_zeros(ctx.shape)
        return give_back(inner, extent.plan, grad, ctx.group).wait(), None, None, None


def _margins(extended: Tensor, extent: _Extent, rank: int) -> list[tuple[Tensor, Tensor | None]]:
    """The parts of an extended slab that lie outside the volume, each with the plane next to it, where there is one."""
    dim, (left, right) = extent.partition.dim, extent.margin(rank)
    last = extended.shape[dim] - right
    found: list[tuple[Tensor, Tensor | None]] = []
    for first, size, edge in ((0, left, left), (last, right, last - 1)):
        if size:
            found.append((extended.narrow(dim, first, size), extended.narrow(dim, edge, 1) if left < last else None))
    return found


@lru_cache(maxsize=1024)
def _extent(partition: Partition, spans: tuple[Span, ...], outside: Outside) -> _Extent:
    """The extended slabs; the same object for the same arguments, as every step of a training asks for them."""
    if outside not in get_args(Outside):
        raise InputError(f"outside must be one of {get_args(Outside)}, got {outside!r}")
    for rank, (low, high) in enumerate(spans):
        if low > high:
            raise InputError(f"the widths cut more planes off than rank {rank} has, of the slabs {partition.sizes}")
        if outside == "border" and low < high and (high <= 0 or low >= partition.total):
            raise InputError(f"the widths leave rank {rank} nothing but border values: pad less")
    return _Extent(partition, spans, outside)


def _spans(partition: Partition, widths: Span | Sequence[Span]) -> tuple[Span, ...]:
    """The planes of every rank's extended slab."""
    if len(widths) == 2 and isinstance(widths[0], int):
        left, right = cast(Span, widths)
        return widened(partition, left, right)
    if len(widths) != partition.ranks:
        raise InputError(f"widths must be (left, right), or that of each of {partition.ranks} ranks, got {widths}")
    each = zip(partition.spans, cast(Sequence[Span], widths), strict=True)
    return tuple((start - left, stop + right) for (start, stop), (left, right) in each)
