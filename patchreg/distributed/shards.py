"""Whole volumes to slabs and back, and sums that belong to all ranks, with gradients.

What gradients mean. A tensor is either *split*, and each rank holds the gradient of its slab, or *common*: every rank
holds the same values, and the whole gradient of them. The loss is common. Then every operation here gives what one
process would: the gradient of a split tensor is the slab of its gradient, and that of a common one is it.

A parameter that layers apply to slabs is common, but a layer knows its own slab alone, so its gradient is a part of the
whole. It must be added up over the ranks, not averaged: by :func:`share` before it is used, or for all parameters
together after the backward pass. The parameters of what is computed alike on all ranks, from common tensors, have their
whole gradient already.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.distributed.agreement import agreement
from patchreg.distributed.communication import Group
from patchreg.distributed.exchange import Plan, fetch, give_back
from patchreg.distributed.partition import Partition, check_same_dim
from patchreg.errors import InputError


def scatter(volume: Tensor, partition: Partition, group: Group = None) -> Tensor:
    """This rank's slab of a volume that all ranks hold; a copy, so that the volume can be freed.

    Args:
        volume: (B, C, I, J, K), of any dtype, common.
        partition: how it is split.
        group: the ranks.

    Returns:
        The slab. The gradient of the volume is gathered from all ranks, and whole on every one.

    Raises:
        InputError: another shape than the partition's, or ranks that disagree.
    """
    ranks = comm.process_group(group)
    with agreement("scatter", ranks) as facts:
        check_ranks(partition, ranks)
        partition.cut(volume, comm.rank_in(ranks))
        facts.same(partition=partition)
        facts.tensor("volume", volume)
    out: Tensor = _Scatter.apply(volume, partition, ranks)
    return out


def gather(local: Tensor, partition: Partition, group: Group = None) -> Tensor:
    """The whole volume, on every rank, from its slabs.

    Args:
        local: this rank's slab, (B, C, I, J, K), of any dtype.
        partition: how the volume is split.
        group: the ranks.

    Returns:
        The volume, common: its gradient is taken to be the same on all ranks, and a slab's is cut out of it.

    Raises:
        InputError: a slab that is not the partition's, or ranks that disagree.
    """
    ranks = comm.process_group(group)
    with agreement("gather", ranks) as facts:
        check_ranks(partition, ranks)
        partition.check("local", local, comm.rank_in(ranks))
        facts.same(partition=partition)
        facts.tensor("local", local, partition.dim)
    out: Tensor = _Gather.apply(local, partition, ranks)
    return out


def repartition(local: Tensor, old: Partition, new: Partition, group: Group = None) -> Tensor:
    """The slab of another partition of the same volume: only the planes that change hands are sent.

    Args:
        local: this rank's slab of ``old``, (B, C, I, J, K), of any dtype.
        old: how the volume is split.
        new: how it shall be.
        group: the ranks.

    Raises:
        InputError: a slab that is not the partition's, partitions of different volumes, or ranks that disagree.
    """
    ranks = comm.process_group(group)
    with agreement("repartition", ranks) as facts:
        check_ranks(old, ranks)
        check_same_dim("the old volume", old, "the new one", new)
        if old.total != new.total:
            raise InputError(f"the partitions must have as many planes, got {old.total} and {new.total}")
        old.check("local", local, comm.rank_in(ranks))
        facts.same(old=old, new=new)
        facts.tensor("local", local, old.dim)
    out: Tensor = _Move.apply(local, Plan(old, new.spans), ranks)
    return out


def add_up(part: Tensor, group: Group = None) -> Tensor:
    """The sum of every rank's ``part``, common. The gradient of a part is that of the sum."""
    out: Tensor = _AddUp.apply(part, comm.process_group(group))
    return out


def share(tensor: Tensor, group: Group = None) -> Tensor:
    """``tensor``, which is common, about to be used on slabs: the ranks' gradients of it are added up.

    All ranks must use what is returned, or those that do wait for the others.
    """
    out: Tensor = _Share.apply(tensor, comm.process_group(group))
    return out


def check_ranks(partition: Partition, group: dist.ProcessGroup) -> None:
    """Raise unless the partition is for as many ranks as the group has."""
    if partition.ranks != comm.size_of(group):
        raise InputError(
            f"the partition is for {partition.ranks} ranks, the group has {comm.size_of(group)}: "
            "make it for this group, with Partition.even or its sizes"
        )


def _everything(partition: Partition) -> Plan:
    return Plan(partition, ((0, partition.total),) * partition.ranks)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, volume: Tensor, partition: Partition, group: dist.ProcessGroup) -> Tensor:
        ctx.partition, ctx.group = partition, group
        return partition.cut(volume, comm.rank_in(group)).clone(memory_format=torch.contiguous_format)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return fetch(upstream, _everything(ctx.partition), ctx.group).wait(), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, partition: Partition, group: dist.ProcessGroup) -> Tensor:
        ctx.partition, ctx.group = partition, group
        return fetch(local, _everything(partition), group).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return ctx.partition.cut(upstream, comm.rank_in(ctx.group)).clone(), None, None


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, plan: Plan, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group, ctx.shape = plan, group, local.shape
        return fetch(local, plan, group).wait()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return give_back(upstream, ctx.plan, upstream.new_zeros(ctx.shape), ctx.group).wait(), None, None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        return comm.reduce_all(part.clone(memory_format=torch.contiguous_format), "sum", group)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return comm.reduce_all(upstream.clone(memory_format=torch.contiguous_format), "sum", ctx.group), None
