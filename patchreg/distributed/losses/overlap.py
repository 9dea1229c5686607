"""Overlap of split label maps: :class:`patchreg.losses.SoftDice` on many ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.distributed.agreement import agreement
from patchreg.distributed.communication import Group
from patchreg.distributed.exchange import Plan, fetch
from patchreg.distributed.partition import Partition, check_same_dim
from patchreg.distributed.sampling import Motion, Sampling, everybodys_planes, origin_of, wanted_planes
from patchreg.distributed.shards import add_up, check_ranks, share
from patchreg.errors import InputError
from patchreg.losses import LabelSet
from patchreg.losses.overlap import overlap_sums
from patchreg.spatial import Grid, MappedGrid, Volume


def soft_dice(
    fixed_labels: Tensor,
    moving_labels: Tensor,
    labels: LabelSet,
    partition: Partition,
    displacement: Tensor | None = None,
    affine: Tensor | None = None,
    output: Partition | None = None,
    smooth: float = 1.0,
    group: Group = None,
) -> Tensor:
    """``1 - mean Dice`` of fixed labels and moving labels seen at ``A x + t + u(x)``, over the labels in sight.

    Each rank gets the planes of the moving labels that it reaches, and forms the sums that Dice is made of; two numbers
    a label are added up. As in one process, positions are float32.

    Args:
        fixed_labels: this rank's slab, (B, 1, i, j, k) integers.
        moving_labels: this rank's slab, (B, 1, I, J, K) integers.
        labels: which labels.
        partition: of the moving labels.
        displacement: ``u`` on this rank's slab of the fixed labels, (B, 3, i, j, k), in voxels. None: zero.
        affine: ``[A | t]``, (3, 4), common, from voxels of the whole fixed to voxels of the whole moving map. None: the
            identity.
        output: partition of the fixed labels, along the same dimension. None: that of the moving labels.
        smooth: voxels added to numerator and denominator.
        group: the ranks.

    Returns:
        A scalar, the same on all ranks.

    Raises:
        InputError: slabs that are not the partition's, or ranks that disagree.

    References:
        Hoffmann et al. 2022 (SynthMorph), arXiv:2004.10282, eq. (3).
    """
    return dice_of(
        [label_sums(fixed_labels, moving_labels, labels, partition, displacement, affine, output, group)], smooth
    )


def dice_of(sums: Sequence[tuple[Tensor, Tensor]], smooth: float) -> Tensor:
    """``1 - mean Dice`` over the labels in sight, from the sums of one or more patches; a scalar."""
    both, sizes = (torch.stack(each).sum(dim=0) for each in zip(*sums, strict=True))
    present = sizes > 0
    dice = (2 * both + smooth) / (sizes + smooth)
    return (1 - (dice * present).sum() / present.sum().clamp(min=1)).float()


def label_sums(
    fixed_labels: Tensor,
    moving_labels: Tensor,
    labels: LabelSet,
    partition: Partition | None,
    displacement: Tensor | None = None,
    affine: Tensor | None = None,
    output: Partition | None = None,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """For each label the shared voxels, and the voxels in both maps added up: (L,) and (L,), float64, common.

    As :func:`soft_dice`, but ``partition`` may be None, and the moving labels whole on all ranks.
    """
    ranks = comm.process_group(group)
    rank = comm.rank_in(ranks)
    output = partition if output is None else output
    with agreement("soft_dice", ranks) as facts:
        if output is None:
            raise InputError("either map must be split")
        check_ranks(output, ranks)
        if partition is not None:
            check_ranks(partition, ranks)
            check_same_dim("the moving labels", partition, "the fixed labels", output)
            partition.check("moving_labels", moving_labels, rank)
        output.check("fixed_labels", fixed_labels, rank)
        if fixed_labels.shape[:2] != moving_labels.shape[:2] or fixed_labels.shape[1] != 1:
            raise InputError(
                "labels must have shapes (B, 1, ...) of one batch, got "
                f"{tuple(fixed_labels.shape)} and {tuple(moving_labels.shape)}"
            )
        if displacement is not None:
            wanted = (fixed_labels.shape[0], 3, *fixed_labels.shape[2:])
            if displacement.shape != wanted:
                raise InputError(f"displacement must have shape {wanted}, got {tuple(displacement.shape)}")
        if affine is not None and affine.shape != (3, 4):
            raise InputError(f"affine must have shape (3, 4), got {tuple(affine.shape)}")
        facts.same(moving_partition=partition, fixed_partition=output, labels=labels.labels)
        facts.tensor("moving_labels", moving_labels, None if partition is None else partition.dim)
        facts.tensor("fixed_labels", fixed_labels, output.dim)
        facts.tensor("displacement", displacement, output.dim)
        facts.tensor("affine", affine)
        whole = torch.eye(3, 4, dtype=torch.float64) if affine is None else affine
        whole = whole.to(moving_labels.device, torch.float64)  # where its gradient is added up, among all others
        motion = Motion(displacement, whole[None].detach(), None)
        i, j, k = fixed_labels.shape[2:]
        if partition is not None:
            origin = origin_of(output.starts[rank], output.dim)
            sampling = Sampling(output.dim, origin, (i, j, k), "linear", "zeros", "auto")
            facts.own = wanted_planes(motion, sampling, partition.total, ranks)
    seen, first = moving_labels, 0
    if partition is not None:
        plan = Plan(partition, everybodys_planes(facts.gathered, partition, output, ranks))
        seen, first = fetch(moving_labels, plan, ranks).wait(), plan.wants[rank][0]
    matrix = torch.cat([share(whole, ranks), whole.new_tensor([[0.0, 0, 0, 1]])])
    starts = output.starts[rank], first
    both, sizes = torch.zeros(2, len(labels), dtype=torch.float64, device=fixed_labels.device)
    for b in range(fixed_labels.shape[0] if fixed_labels.numel() else 0):
        u = None if displacement is None else displacement[b : b + 1]
        shared, each = _sums(fixed_labels[b], seen[b], labels, u, matrix, output.dim, starts)
        both, sizes = both + shared, sizes + each
    if displacement is not None and not both.requires_grad:  # no planes, or none that reach the moving labels
        both = both + 0 * displacement.sum()  # but whatever made it takes part in the backward pass on all ranks
    both, sizes = add_up(torch.stack([both, sizes]), ranks)
    return both + 0 * matrix.sum().to(both.device), sizes  # all ranks add up the gradient of the affine map


def _sums(
    fixed: Tensor,
    moving: Tensor,
    labels: LabelSet,
    displacement: Tensor | None,
    matrix: Tensor,
    dim: int,
    starts: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Shared voxels and both images' voxels of every label; a world of voxels of the whole volumes gives slabs a place."""
    if moving.numel() == 0:
        sizes = torch.bincount(labels.index(fixed).flatten(), minlength=len(labels) + 1)[:-1]
        return torch.zeros_like(sizes), sizes
    here, there = (
        Volume(slab, Grid(slab.shape[1:], _translation(dim, start)))
        for slab, start in ((fixed, starts[0]), (moving, starts[1]))
    )
    mapped = MappedGrid(here.grid, matrix, displacement)
    return overlap_sums(MappedGrid.identity(here.grid), here, mapped, there, labels)


def _translation(dim: int, by: int) -> Tensor:
    matrix = torch.eye(4, dtype=torch.float64)
    matrix[dim - 2, 3] = by
    return matrix
