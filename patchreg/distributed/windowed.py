"""Sums over a split volume of what depends on a few planes around each, with exact gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.distributed.exchange import Plan, fetch, give_back
from patchreg.distributed.partition import Partition, Span, clip, overlap

NUMBERS = 1 << 22
"""Numbers of an image that are looked at together, if they make enough planes."""


class Term(Protocol):
    """What is summed."""

    def __call__(self, *pieces: Tensor, core: Span) -> Iterable[Tensor]:
        """The sum over some planes, in parts: float64 scalars, differentiated one after the other.

        Args:
            pieces: of each image those planes, and the ones around them that the term reaches, within the volume.
            core: which planes of the pieces count.
        """


def windowed_sum(
    term: Term, images: Sequence[Tensor], partition: Partition, reach: Span, group: dist.ProcessGroup
) -> Tensor:
    """The sum of a term over all planes of all ranks: a float64 scalar, common, with the gradients of one process.

    The gradients are formed with the value, piece by piece, and kept, in float32 at least: one slab for each image that
    wants one. Besides them there are the halos, and what the term makes of a piece; slabs are never copied whole. The
    backward pass sends nothing. What is inside is computed while the halos are on their way.

    Args:
        term: the same on all ranks.
        images: slabs (B, C, I, J, K); of those that want no gradient any dtype.
        partition: theirs.
        reach: planes before and after one that its term depends on.
        group: the ranks.
    """
    out: Tensor = _WindowedSum.apply(term, partition, reach, group, *images)
    return out


def halo_plans(partition: Partition, reach: Span) -> list[Plan]:
    """The planes before and those after every rank's slab."""
    before = tuple(clip((a - reach[0], a), partition.total) if a < b else (a, a) for a, b in partition.spans)
    after = tuple(clip((b, b + reach[1]), partition.total) if a < b else (b, b) for a, b in partition.spans)
    return [Plan(partition, before), Plan(partition, after)]


class _Parts:
    """A slab between two halos, each a tensor of its own, addressed by the planes of the volume."""

    def __init__(self, dim: int, parts: Sequence[tuple[int, Tensor]]) -> None:
        self._dim, self._parts = dim, parts

    def _within(self, span: Span) -> list[tuple[Span, Tensor]]:
        found = []
        for start, tensor in self._parts:
            low, high = overlap(span, (start, start + tensor.shape[self._dim]))
            if low < high:
                found.append(((low, high), tensor.narrow(self._dim, low - start, high - low)))
        return found

    def read(self, span: Span) -> Tensor:
        """The planes of a span, which are all there; without a copy where one part has them all."""
        tensors = [tensor for _, tensor in self._within(span)]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=self._dim)

    def add(self, span: Span, values: Tensor) -> None:
        """Add to the planes of a span."""
        for (low, high), tensor in self._within(span):
            tensor.add_(values.narrow(self._dim, low - span[0], high - low))


class _WindowedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, term: Term, partition: Partition, reach: Span, group: dist.ProcessGroup, *images: Tensor
    ) -> Tensor:
        rank, dim = comm.rank_in(group), partition.dim
        wanted = ctx.needs_input_grad[4:]
        plans, (start, stop) = halo_plans(partition, reach), partition.bounds(rank)
        firsts = [plans[0].wants[rank][0], stop]
        flights = [[fetch(image, plan, group) for plan in plans] for image in images]
        grads = [torch.zeros_like(x, dtype=_precise(x)) if w else None for x, w in zip(images, wanted, strict=True)]
        halo_grads: list[list[Tensor]] = []
        total = images[0].new_zeros((), dtype=torch.float64)

        inside, at_ends = _chunks(images[0], partition, rank, reach)
        slabs = [_Parts(dim, [(start, image)]) for image in images]
        sums = [_Parts(dim, [] if grad is None else [(start, grad)]) for grad in grads]
        for chunk in inside:
            total += _sweep(term, slabs, sums, wanted, chunk, reach, partition.total)
        halos = [[flight.wait() for flight in both] for both in flights]
        slabs = [
            _Parts(dim, [(firsts[0], before), (start, image), (firsts[1], after)])
            for image, (before, after) in zip(images, halos, strict=True)
        ]
        halo_grads = [
            [torch.zeros_like(halo, dtype=_precise(halo)) for halo in both] if w else []
            for both, w in zip(halos, wanted, strict=True)
        ]
        sums = [
            _Parts(dim, [] if grad is None else [(firsts[0], both[0]), (start, grad), (firsts[1], both[1])])
            for grad, both in zip(grads, halo_grads, strict=True)
        ]
        for chunk in at_ends:
            total += _sweep(term, slabs, sums, wanted, chunk, reach, partition.total)

        returning = [
            give_back(halo, plan, grad, group)
            for grad, both in zip(grads, halo_grads, strict=True)
            if grad is not None
            for halo, plan in zip(both, plans, strict=True)
        ]
        comm.reduce_all(total, "sum", group)
        for flight in returning:
            flight.wait()
        ctx.save_for_backward(*grads)
        ctx.dtypes = [image.dtype for image in images]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, None, None, *(None if g is None else (upstream * g).to(dtype) for g, dtype in grads)


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(image: Tensor, partition: Partition, rank: int, reach: Span) -> tuple[list[Span], list[Span]]:
    """The rank's planes in portions: those that need no other rank's planes, and those that do."""
    start, stop = partition.bounds(rank)
    plane = max(1, image.numel() // max(1, stop - start))
    size = max(-(-NUMBERS // plane), 8 * sum(reach), 1)
    inside: list[Span] = []
    at_ends: list[Span] = []
    for low in range(start, stop, size):
        chunk = (low, min(low + size, stop))
        first, end = clip((chunk[0] - reach[0], chunk[1] + reach[1]), partition.total)
        (inside if start <= first and end <= stop else at_ends).append(chunk)
    return inside, at_ends


def _sweep(
    term: Term, slabs: list[_Parts], sums: list[_Parts], wanted: Sequence[bool], chunk: Span, reach: Span, total: int
) -> Tensor:
    """The term over one portion; its gradients are added to ``sums``."""
    span = clip((chunk[0] - reach[0], chunk[1] + reach[1]), total)
    core = (chunk[0] - span[0], chunk[1] - span[0])
    pieces = [slab.read(span).detach() for slab in slabs]
    added = pieces[0].new_zeros((), dtype=torch.float64)
    if not any(wanted):
        for value in term(*pieces, core=core):
            added += value
        return added
    pieces = [x.to(_precise(x)).requires_grad_() if wants else x for x, wants in zip(pieces, wanted, strict=True)]
    inputs = [piece for piece, wants in zip(pieces, wanted, strict=True) if wants]
    grads = [parts for parts, wants in zip(sums, wanted, strict=True) if wants]
    with torch.enable_grad():
        for value in term(*pieces, core=core):
            for parts, grad in zip(grads, torch.autograd.grad(value, inputs), strict=True):
                parts.add(span, grad)
            added += value.detach()
    return added
