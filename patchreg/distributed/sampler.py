"""Sampling a split image through an affine map and a split displacement: :func:`patchreg.ops.warp` on many ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from patchreg import ops
from patchreg.distributed import communication as comm
from patchreg.distributed.agreement import agreement
from patchreg.distributed.communication import Group
from patchreg.distributed.exchange import Plan, fetch, give_back
from patchreg.distributed.partition import Partition, check_same_dim
from patchreg.distributed.reach import positions
from patchreg.distributed.ring import Ring
from patchreg.distributed.sampling import Motion, Sampling, everybodys_planes, origin_of, wanted_planes
from patchreg.distributed.shards import check_ranks
from patchreg.errors import InputError
from patchreg.types import Backend, Interpolation, Padding, Shape3

Method: TypeAlias = Literal["auto", "exchange", "ring"]


def warp(
    image: Tensor,
    partition: Partition,
    displacement: Tensor | None = None,
    affine: Tensor | None = None,
    scale: Tensor | float | None = None,
    shape: Shape3 | None = None,
    output: Partition | None = None,
    group: Group = None,
    mode: Interpolation = "linear",
    padding: Padding = "zeros",
    method: Method = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """This rank's slab of the image sampled at ``A x + t + S u(x)``: :func:`patchreg.ops.warp` of whole volumes.

    Index coordinates are those of the whole output and the whole image. Values and gradients are those of one process:
    the gradient of the image is brought to the ranks that hold it, those of the affine map and the scale, which are
    common to all ranks, are whole on every rank.

    No rank holds the whole image. Two ways, of which ``"auto"`` takes the first unless a rank would need more than three
    slabs of the largest size:

    - ``"exchange"``: each rank finds out which planes its positions reach, all tell each other, and exactly these are
      sent. Memory: the planes that a rank needs, kept for the gradient to the positions.
    - ``"ring"``: slabs travel round, and each rank takes what it needs from the one at hand. Memory: two slabs, and one
      more output, whatever the positions; nothing is kept, so the backward pass lets them travel again, with another two
      for the image's gradient. Every rank samples all of its output from each slab that it reaches, so it takes longer.

    Args:
        image: this rank's slab, (B, C, I, J, K). Integer tensors are taken by the modes ``"nearest"`` and ``"label"``.
        partition: of the image.
        displacement: ``u`` on this rank's slab of the output, (B, 3, i, j, k), in voxels. None: no displacement.
        affine: ``[A | t]``, (3, 4) or (B, 3, 4), common. None: the identity.
        scale: ``S``, a number, (3, 3) or (B, 3, 3), common. None: the identity.
        shape: (i, j, k) of the whole output where there is no displacement. None: that of the whole image.
        output: partition of the output, along the same dimension. None: that of the image.
        group: the ranks.
        mode: see :func:`patchreg.ops.warp`.
        padding: likewise, beyond the whole image.
        method: see above.
        backend: see :mod:`patchreg.ops`.

    Returns:
        This rank's slab of the output, (B, C, i, j, k).

    Raises:
        InputError: as :func:`patchreg.ops.warp`, slabs that are not the partition's, or ranks that disagree.
        NoGradient: a gradient was asked for in a mode that has none.

    References:
        Jena et al. 2025, arXiv:2509.25044, sec. 3, for the distributed sampler.
    """
    ranks = comm.process_group(group)
    rank = comm.rank_in(ranks)
    output = partition if output is None else output
    with agreement("warp", ranks) as facts:
        check_ranks(partition, ranks)
        check_same_dim("the image", partition, "the output", output)
        partition.check("image", image, rank)
        if displacement is not None:
            output.check("displacement", displacement, rank)
        if method not in get_args(Method):
            raise InputError(f"method must be one of {get_args(Method)}, got {method!r}")
        batch = _probe(image, displacement, affine, scale, mode, padding, backend, partition.dim).shape[0]
        out_shape = _local_shape(image, partition, displacement, shape, output, rank)
        facts.same(image_partition=partition, output_partition=output, mode=mode, padding=padding, method=method)
        facts.same(shape=shape, scale_number=None if isinstance(scale, Tensor) else scale)
        facts.tensor("image", image, partition.dim)
        facts.tensor("displacement", displacement, partition.dim)
        facts.tensor("affine", affine)
        facts.tensor("scale", scale if isinstance(scale, Tensor) else None)
        motion = _motion(image, displacement, affine, scale)
        origin = origin_of(output.starts[rank], partition.dim)
        sampling = Sampling(partition.dim, origin, out_shape, mode, padding, backend)
        facts.own = wanted_planes(motion, sampling, partition.total, ranks)
    plan = Plan(partition, everybodys_planes(facts.gathered, partition, output, ranks))
    ring = Ring(partition, pairs=mode == "nearest") if takes_ring(plan, method) else None
    job = _Job(plan, ring, sampling, ranks, (batch, image.shape[1], *out_shape))
    out: Tensor = _Warp.apply(image, displacement, motion.affine, motion.scale, job)
    return out


def takes_ring(plan: Plan, method: Method = "auto") -> bool:
    """Whether slabs travel round, for what the ranks want and a method; see :func:`warp`."""
    most = max(high - low for low, high in plan.wants)
    return method == "ring" or (method == "auto" and most > 3 * max(plan.partition.sizes))


def _probe(
    image: Tensor,
    displacement: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | float | None,
    mode: Interpolation,
    padding: Padding,
    backend: Backend,
    dim: int,
) -> Tensor:
    """A warp of one voxel, which makes all the checks of the operation."""

    def voxel(like: Tensor) -> Tensor:
        sizes = [1 if d in (0, dim) else min(n, 1) for d, n in enumerate(like.shape)]
        sizes[:2] = like.shape[:2]
        return torch.zeros(sizes, dtype=like.dtype, device=like.device).requires_grad_(like.requires_grad)

    u = None if displacement is None else voxel(displacement)
    return ops.warp(voxel(image), u, affine, scale, None if u is not None else (1, 1, 1), mode, padding, backend)


def _local_shape(
    image: Tensor, partition: Partition, displacement: Tensor | None, shape: Shape3 | None, output: Partition, rank: int
) -> Shape3:
    """(i, j, k) of this rank's slab of the output."""
    if displacement is not None:
        if shape is not None:
            raise InputError("the displacement says which shape the output has: leave out shape")
        i, j, k = displacement.shape[2:]
        return i, j, k
    axis = partition.dim - 2
    whole = list(image.shape[2:] if shape is None else shape)
    if shape is not None and (len(whole) != 3 or min(whole) < 1 or whole[axis] != output.total):
        raise InputError(
            f"shape {shape} must be that of the whole output, {output.total} planes along dim {output.dim}"
        )
    whole[axis] = output.sizes[rank]
    return whole[0], whole[1], whole[2]


def _motion(image: Tensor, displacement: Tensor | None, affine: Tensor | None, scale: Tensor | float | None) -> Motion:
    """Everything with a batch."""
    if affine is None:
        affine = torch.eye(3, 4, dtype=torch.float64, device=image.device)
    if isinstance(scale, Tensor) and scale.ndim == 2:
        scale = scale[None]
    return Motion(displacement, affine if affine.ndim == 3 else affine[None], scale)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is sampled.

    Args:
        plan: the planes that every rank reads.
        ring: how slabs travel, or None where planes are exchanged.
        sampling: this rank's part.
        group: the ranks.
        shape: of the result, (B, C, i, j, k).
    """

    plan: Plan
    ring: Ring | None
    sampling: Sampling
    group: dist.ProcessGroup
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return comm.rank_in(self.group)

    def uses(self, source: int) -> bool:
        """Whether a slab that comes round is of use: this rank's own always, because every voxel needs one."""
        assert self.ring is not None
        return source == self.rank or self.ring.reads(source, self.plan.wants[self.rank])

    def pieces(self, source: int, motion: Motion) -> Iterator[tuple[slice, Tensor, Sampling, Motion]]:
        """The parts of the output that are sampled from a slab that comes round: which planes along dim 2, and which of
        their voxels, (B, 1, planes, j, k)."""
        start, stop = self.plan.partition.bounds(source)
        last = self.plan.partition.total - 1
        if 0 in self.shape:
            return
        for planes, sampling, part in self.sampling.pieces(motion):
            whole, axis = sampling.affine(part.affine, 0), sampling.dim - 2
            found = []
            for _, at in positions(part.displacement, whole, part.scale, sampling.shape, axis):
                below = at.nan_to_num(nan=-1.0).floor().clamp(0, last)
                here = (below >= start) & (below < stop)
                if sampling.mode == "linear" and source == self.rank:
                    here |= at.isnan()  # which no slab has, and any slab makes
                found.append(here)
            here = torch.cat(found, dim=1)[:, None]
            if bool(here.any()):
                yield planes, here, sampling, part


def _sample(sampling: Sampling, slab: Tensor, first: int, motion: Motion) -> Tensor:
    """As :meth:`Sampling.sample`, for slabs without planes, too: what reaches none is zero, or NaN where the position is."""
    if slab.shape[sampling.dim] == 0:
        slab = slab.new_zeros([max(n, 1) for n in slab.shape])
    return sampling.sample(slab, first, motion)


def _differentiate(
    sampling: Sampling, upstream: Tensor, slab: Tensor, first: int, motion: Motion, wanted: list[bool]
) -> list[Tensor | None]:
    """As :meth:`Sampling.differentiate`, for slabs and outputs without planes, too."""
    if 0 in sampling.shape or slab.shape[sampling.dim] == 0:
        tensors = (slab, motion.displacement, motion.affine, motion.scale)
        return [
            torch.zeros_like(t) if wants and isinstance(t, Tensor) else None
            for t, wants in zip(tensors, wanted, strict=True)
        ]
    return sampling.differentiate(upstream, slab, first, motion, wanted)


class _Warp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        displacement: Tensor | None,
        affine: Tensor,
        scale: Tensor | float | None,
        job: _Job,
    ) -> Tensor:
        motion = Motion(displacement, affine, scale)
        if job.ring is None:
            read = fetch(image, job.plan, job.group).wait()
            if 0 in job.shape:
                out = image.new_empty(job.shape)
            else:
                out = _sample(job.sampling, read, job.plan.wants[job.rank][0], motion)
        else:
            read = image
            out = _sample_ring(image, motion, job)
        ctx.job, ctx.shape, ctx.dtype = job, image.shape, image.dtype
        ctx.number = None if isinstance(scale, Tensor) else scale
        kept = read if any(ctx.needs_input_grad[1:4]) else None
        ctx.save_for_backward(kept, displacement, affine, scale if isinstance(scale, Tensor) else None)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        read, displacement, affine, matrix = ctx.saved_tensors
        job, wanted = ctx.job, list(ctx.needs_input_grad[:4])
        motion = Motion(displacement, affine, ctx.number if matrix is None else matrix)
        if job.ring is not None:
            own = upstream.new_zeros(ctx.shape, dtype=ctx.dtype) if read is None else read
            found = _differentiate_ring(upstream, own, read is not None, motion, job, wanted)
        else:
            low, high = job.plan.wants[job.rank]
            if read is None:
                shape = list(ctx.shape)
                shape[job.sampling.dim] = high - low
                read = upstream.new_zeros(shape, dtype=ctx.dtype)
            found = _differentiate(job.sampling, upstream, read, low, motion, wanted)
            if found[0] is not None:
                grad = upstream.new_zeros(ctx.shape, dtype=ctx.dtype)
                found[0] = give_back(found[0], job.plan, grad, job.group).wait()
        _add_up([grad for grad in found[2:] if grad is not None], job.group)
        return (*found, None)


def _add_up(grads: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sum over the ranks, in place, in one message of float64."""
    if grads:
        whole = comm.reduce_all(torch.cat([grad.double().flatten() for grad in grads]), "sum", group)
        for grad, values in zip(grads, whole.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(values.view_as(grad))


def _sample_ring(image: Tensor, motion: Motion, job: _Job) -> Tensor:
    """Every voxel from the slab that holds the plane below its position."""
    ring = job.ring
    assert ring is not None
    out = image.new_zeros(job.shape)
    for source, slab in ring.travel(ring.depart(image, job.group), job.group):
        if job.uses(source):
            for planes, here, sampling, part in job.pieces(source, motion):
                place = out[:, :, planes]
                place.copy_(torch.where(here, _sample(sampling, slab, ring.first(source), part), place))
    return out


def _differentiate_ring(
    upstream: Tensor, image: Tensor, has_values: bool, motion: Motion, job: _Job, wanted: list[bool]
) -> list[Tensor | None]:
    """Slabs travel again, and after them the sums of their gradients, which end at home.

    Args:
        upstream: the gradient of the output.
        image: this rank's slab, or something of its shape and dtype.
        has_values: whether its values are known, and needed; else no slabs are sent.
        motion: where it was sampled.
        job: how.
        wanted: which gradients.
    """
    ring = job.ring
    assert ring is not None
    slabs = ring.travel(ring.depart(image, job.group), job.group) if has_values else _blank(ring, image, job.rank)
    tensors = (None, motion.displacement, motion.affine, motion.scale)
    found = [torch.zeros_like(t) if w and isinstance(t, Tensor) else None for t, w in zip(tensors, wanted, strict=True)]
    home: Tensor | None = None
    passing: Tensor | None = None  # the sum of the gradients of the slab at hand
    for step, (source, slab) in enumerate(slabs):
        if wanted[0] and step < 2:
            home, passing = passing, torch.zeros_like(slab)
        elif passing is not None:
            passing = _passed(ring, passing, slab, job.group)
        for planes, here, sampling, part in job.pieces(source, motion) if job.uses(source) else ():
            share = torch.where(here, upstream[:, :, planes], torch.zeros_like(upstream[:1, :1, :1, :1, :1]))
            places = (passing, None if found[1] is None else found[1][:, :, planes], found[2], found[3])
            _add(places, _differentiate(sampling, share, slab, ring.first(source), part, wanted))
    if passing is not None:
        if home is not None:
            passing = _passed(ring, passing, home, job.group).add_(home)
        found[0] = ring.arrive(passing, image, job.group)
    return found


def _add(places: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
    for place, grad in zip(places, grads, strict=True):
        if place is not None and grad is not None:
            place.add_(grad)


def _passed(ring: Ring, passing: Tensor, like: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Pass on a sum; that which comes."""
    coming = torch.empty_like(like)
    comm.finish_messages(ring.pass_on(passing, coming, group))
    return coming


def _blank(ring: Ring, like: Tensor, rank: int) -> Iterator[tuple[int, Tensor]]:
    """As :meth:`Ring.travel`, of slabs whose values do not matter: nothing is sent."""
    for step in range(ring.partition.ranks):
        source = (rank - step) % ring.partition.ranks
        yield source, like.new_zeros(ring.shape(like, source))
