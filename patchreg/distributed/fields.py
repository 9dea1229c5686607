"""Displacements on many ranks: their composition, scaling and squaring, and the force of local correlation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from patchreg.distributed import communication as comm
from patchreg.distributed.agreement import agreement
from patchreg.distributed.communication import Group
from patchreg.distributed.halo import exchange_halo
from patchreg.distributed.partition import Partition
from patchreg.distributed.sampler import warp
from patchreg.distributed.shards import check_ranks
from patchreg.errors import InputError
from patchreg.networks.force import forces
from patchreg.types import Backend, Memory, Padding


def compose(
    u: Tensor,
    v: Tensor,
    partition: Partition,
    affine: Tensor | None = None,
    scale: Tensor | float | None = None,
    output: Partition | None = None,
    group: Group = None,
    padding: Padding = "border",
    backend: Backend = "auto",
) -> Tensor:
    """This rank's slab of the displacement "``v`` first, then ``u``": :func:`patchreg.ops.compose` of whole fields.

    Values and gradients are those of one process. What is sent and kept: see :func:`patchreg.distributed.warp`.

    Args:
        u: this rank's slab of the displacement applied second, (B, 3, I, J, K).
        v: of that applied first, (B, 3, i, j, k).
        partition: of ``u``.
        affine: see :func:`patchreg.ops.compose`, of whole fields; common.
        scale: likewise.
        output: partition of ``v``. None: that of ``u``.
        group: the ranks.
        padding: what ``u`` is outside its lattice.
        backend: see :mod:`patchreg.ops`.

    Returns:
        This rank's slab, (B, 3, i, j, k).

    Raises:
        InputError: as :func:`patchreg.ops.compose`, slabs that are not the partition's, or ranks that disagree.

    References:
        Vercauteren et al. 2009, doi:10.1016/j.neuroimage.2008.10.040, sec. 2.1.
    """
    return warp(u, partition, v, affine, scale, output=output, group=group, padding=padding, backend=backend) + v


def integrate(
    velocity: Tensor,
    partition: Partition,
    steps: int = 7,
    padding: Padding = "border",
    memory: Memory = "recompute",
    group: Group = None,
    backend: Backend = "auto",
) -> Tensor:
    """This rank's slab of the displacement ``exp(v) - id``: :func:`patchreg.ops.integrate` of a whole velocity.

    Values and gradients are those of one process. Each squaring fetches the planes that its displacements reach. Memory,
    in slabs of float32: two besides the velocity for the result, and the planes fetched for one squaring. For the
    gradient, of which ``"recompute"`` keeps nothing from the forward pass but the velocity, up to three more fields from
    which the others are made again, and of the one at hand the planes fetched, and both gradients. ``"stored"`` keeps
    ``steps - 1`` fields instead of making them again. Half precision is integrated in float32.

    Args:
        velocity: this rank's slab, (B, 3, I, J, K), in voxels of its own lattice.
        partition: of the velocity.
        steps: squarings; the velocity is divided by ``2**steps`` first.
        padding: what the field is outside its lattice.
        memory: see above; ``"recompute"`` takes, with 7 steps, 9 squarings more.
        group: the ranks.
        backend: see :mod:`patchreg.ops`.

    Returns:
        This rank's slab, (B, 3, I, J, K), in voxels.

    Raises:
        InputError: no slab of a field, a negative number of steps, or ranks that disagree.

    References:
        Arsigny et al. 2006, doi:10.1007/11866565_113, sec. 3; Dalca et al. 2018, arXiv:1805.04605, sec. 3.1.
    """
    ranks = comm.process_group(group)
    with agreement("integrate", ranks) as facts:
        check_ranks(partition, ranks)
        partition.check("velocity", velocity, comm.rank_in(ranks))
        if velocity.shape[1] != 3:
            raise InputError(f"velocity must have three components, got shape {tuple(velocity.shape)}")
        if steps < 0:
            raise InputError(f"steps must not be negative, got {steps}")
        if padding not in get_args(Padding) or memory not in get_args(Memory):
            raise InputError(
                f"padding must be one of {get_args(Padding)} and memory of {get_args(Memory)}, got {padding!r} and {memory!r}"
            )
        facts.same(partition=partition, steps=steps, padding=padding, memory=memory, backend=backend)
        facts.tensor("velocity", velocity, partition.dim)
    stored = memory == "stored" and velocity.requires_grad and torch.is_grad_enabled()
    out: Tensor = _Integrate.apply(velocity, _Squaring(partition, ranks, padding, backend), steps, stored)
    return out


@dataclass(frozen=True)
class _Squaring:
    """``u(x) + u(x + u(x))`` on slabs."""

    partition: Partition
    group: dist.ProcessGroup
    padding: Padding
    backend: Backend

    def square(self, u: Tensor) -> Tensor:
        return warp(u, self.partition, u, group=self.group, padding=self.padding, backend=self.backend).add_(u)

    def advance(self, u: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            u = self.square(u)
        return u

    def pull(self, u: Tensor, upstream: Tensor) -> Tensor:
        """The gradient to ``u`` from that to its square."""
        u = u.detach().requires_grad_()
        with torch.enable_grad():
            edge = get_gradient_edge(self.square(u))  # the graph does without the result
        return torch.autograd.grad([edge], u, [upstream])[0]


class _Integrate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, velocity: Tensor, squaring: _Squaring, steps: int, stored: bool) -> Tensor:
        ctx.squaring, ctx.steps, ctx.dtype = squaring, steps, velocity.dtype
        u = _start(velocity, steps)
        fields = []
        for step in range(steps):
            u = squaring.square(u)
            if stored and step < steps - 1:
                fields.append(u)
        ctx.save_for_backward(velocity, *fields)
        return u.to(velocity.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        velocity, *fields = ctx.saved_tensors
        squaring, gradient = ctx.squaring, upstream.to(torch.promote_types(ctx.dtype, torch.float32))
        known = list(enumerate([_start(velocity, ctx.steps), *fields]))
        for k in reversed(range(ctx.steps)):
            gradient = squaring.pull(_recompute(squaring, known, k), gradient)
        return (gradient * 2.0**-ctx.steps).to(ctx.dtype), None, None, None


def _start(velocity: Tensor, steps: int) -> Tensor:
    return velocity.to(torch.promote_types(velocity.dtype, torch.float32)) * 2.0**-steps


def _recompute(squaring: _Squaring, known: list[tuple[int, Tensor]], k: int) -> Tensor:
    """``u_k``, for falling ``k``: from the latest field that is known, with checkpoints half way, and half way again."""
    while known[-1][0] < k:
        at, u = known[-1]
        middle = (at + k + 1) // 2
        known.append((middle, squaring.advance(u, middle - at)))
    return known.pop()[1]


def lncc_force(fixed: Tensor, moving: Tensor, window: int, partition: Partition, group: Group = None) -> Tensor:
    """This rank's slab of :func:`patchreg.networks.force.lncc_force` of whole images.

    A window of planes comes from either side; the root mean square is that of the whole volume.

    Args:
        fixed: this rank's slab, (B, C, I, J, K).
        moving: likewise.
        window: odd side of the correlation's window, in voxels.
        partition: of both.
        group: the ranks.

    Returns:
        This rank's slab, (B, 3, I, J, K) float32. No gradient passes.

    Raises:
        InputError: slabs that are not the partition's, or ranks that disagree.
    """
    ranks = comm.process_group(group)
    rank, dim = comm.rank_in(ranks), partition.dim
    with agreement("lncc_force", ranks) as facts:
        check_ranks(partition, ranks)
        partition.check("fixed", fixed, rank)
        partition.check("moving", moving, rank)
        facts.same(partition=partition, window=window)
        facts.tensor("fixed", fixed.detach(), dim)
        facts.tensor("moving", moving.detach(), dim)
    reach = max(1, window - 1)  # of the gradient of windows that see a voxel, and of the slope
    still, image = (
        exchange_halo(x.detach().float(), partition, (reach, reach), ranks, outside="nothing", check=False)
        for x in (fixed, moving)
    )
    start, stop = partition.bounds(rank)
    force = forces(still, image, window).narrow(dim, min(reach, start), stop - start) if start < stop else _none(fixed)
    squares = comm.reduce_all(force.double().square().sum(dim=(1, 2, 3, 4), keepdim=True), "sum", ranks)
    numbers = 3 * math.prod(partition.total if d == dim else fixed.shape[d] for d in (2, 3, 4))
    size = (squares / numbers).sqrt().float()
    return force / size.clamp(min=torch.finfo(torch.float32).tiny)


def _none(like: Tensor) -> Tensor:
    return like.new_zeros((like.shape[0], 3, *like.shape[2:]), dtype=torch.float32)
