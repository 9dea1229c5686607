"""The checks that losses of split volumes share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.distributed.agreement import Facts
from patchreg.distributed.partition import Partition
from patchreg.distributed.shards import check_ranks
from patchreg.errors import InputError
from patchreg.ops import checks


def check_pair(
    facts: Facts, fixed: Tensor, moving: Tensor, mask: Tensor | None, partition: Partition, group: dist.ProcessGroup
) -> None:
    """Raise unless both images, and the mask, are this rank's slabs; note what all ranks must agree upon."""
    check_slab(facts, "fixed", fixed, partition, group)
    check_slab(facts, "moving", moving, partition, group)
    checks.same_shape("fixed", fixed, "moving", moving)
    facts.tensor("mask", mask, partition.dim)
    if mask is not None:
        partition.check("mask", mask, comm.rank_in(group))
        if mask.shape[0] not in (1, fixed.shape[0]) or mask.shape[1] != 1 or mask.shape[2:] != fixed.shape[2:]:
            wanted = (fixed.shape[0], 1, *fixed.shape[2:])
            raise InputError(f"mask must have shape {wanted}, got {tuple(mask.shape)}")


def check_slab(
    facts: Facts, name: str, local: Tensor, partition: Partition, group: dist.ProcessGroup, channels: int | None = None
) -> None:
    """Raise unless ``local`` is this rank's slab of a floating volume; note what all ranks must agree upon."""
    check_ranks(partition, group)
    partition.check(name, local, comm.rank_in(group))
    checks.volume(name, local if local.shape[partition.dim] else one_plane(local, partition), channels)
    facts.same(partition=partition)
    facts.tensor(name, local, partition.dim)


def one_plane(local: Tensor, partition: Partition) -> Tensor:
    """A plane of nothing in particular, where a slab has none."""
    shape = list(local.shape)
    shape[partition.dim] = 1
    return local.new_empty(shape)


def one_voxel(like: Tensor) -> Tensor:
    """A volume of one voxel, to let an operation check its other arguments."""
    return torch.zeros((1, 1, 1, 1, 1), dtype=like.dtype, device=like.device)


def whole_numel(local: Tensor, partition: Partition) -> int:
    """Numbers of the whole volume."""
    shape = list(local.shape)
    shape[partition.dim] = partition.total
    return torch.Size(shape).numel()


def selected_counts(mask: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a mask over all ranks, of each of the batch, float64.

    Raises:
        InputError: one is zero; on all ranks.
    """
    found = comm.reduce_all(mask.flatten(1).sum(dim=1, dtype=torch.float64), "sum", group)
    if not bool((found > 0).all()):
        raise InputError("mask is empty: no voxel is selected")
    return found
