"""What a rank sends in one step, forward and backward, before anything is run.

Tests hold that these formulas are what :func:`patchreg.distributed.counting` counts. Sizes are those of one plane across the
dimension that is split, ``B C J K`` times the bytes of a number; what a rank receives is what others send to it. Losses send
gradients as float32 at least: for half precision ``gradient_plane`` is twice ``plane``.
"""

from __future__ import annotations

from collections.abc import Sequence

from patchreg.distributed import agreement
from patchreg.distributed.communication import Traffic
from patchreg.distributed.exchange import Plan
from patchreg.distributed.halo import halo_plan
from patchreg.distributed.partition import Partition, Span, halo_widths
from patchreg.distributed.ring import Ring
from patchreg.distributed.windowed import halo_plans

NUMBER = 8
"""Bytes of a float64, in which everything is reduced."""


def halo(
    partition: Partition,
    widths: Span | Sequence[Span],
    rank: int,
    plane: int,
    gradient: bool = True,
    check: bool = True,
) -> Traffic:
    """Of :func:`patchreg.distributed.exchange_halo`.

    Args:
        partition: of the volume.
        widths: as the function takes them.
        rank: whose.
        plane: bytes of a plane.
        gradient: whether there is a backward pass.
        check: as the function takes it.
    """
    plan = halo_plan(partition, widths)
    sent = plan.traffic(rank, plane) + _if(gradient, plan.traffic(rank, plane, back=True))
    return sent + _if(check, agreement.traffic(partition.ranks))


def conv(
    partition: Partition,
    rank: int,
    plane: int,
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    gradient: bool = True,
) -> Traffic:
    """Of the halo of a convolution or pooling behind a layer that was checked; weights are not in it."""
    return halo(
        partition, halo_widths(partition, kernel, stride, padding, dilation), rank, plane, gradient, check=False
    )


def lncc(
    partition: Partition,
    rank: int,
    plane: int,
    window: int = 9,
    gradients: int = 1,
    mask_plane: int = 0,
    batch: int = 1,
    gradient_plane: int | None = None,
) -> Traffic:
    """Of :func:`patchreg.distributed.lncc`.

    Args:
        partition: of both images.
        rank: whose.
        plane: bytes of a plane of an image.
        window: its side.
        gradients: how many of the two images want one.
        mask_plane: voxels of a plane of the mask, all of its batch; 0 without a mask.
        batch: of the mask.
        gradient_plane: see above. None: ``plane``.
    """
    plans = halo_plans(partition, (window // 2, window // 2))
    sent = _sum(2 * [plan.traffic(rank, plane) for plan in plans])
    back = plane if gradient_plane is None else gradient_plane
    sent += _sum(gradients * [plan.traffic(rank, back, back=True) for plan in plans])
    if mask_plane:
        sent += _sum([plan.traffic(rank, mask_plane) for plan in plans])
        sent += Traffic.reducing(NUMBER * batch, partition.ranks)
    return sent + _scalar(partition.ranks)


def regularity(partition: Partition, rank: int, plane: int, order: int, gradient: bool = True) -> Traffic:
    """Of :func:`patchreg.distributed.diffusion` (order 1) and :func:`patchreg.distributed.bending_energy` (order 2)."""
    plans = halo_plans(partition, (0, order))
    sent = _sum([plan.traffic(rank, plane) for plan in plans])
    sent += _if(gradient, _sum([plan.traffic(rank, plane, back=True) for plan in plans]))
    return sent + _scalar(partition.ranks)


def mse(ranks: int, masked: bool = False) -> Traffic:
    """Of :func:`patchreg.distributed.mse`."""
    return _scalar(ranks) + _if(masked, Traffic.reducing(NUMBER, ranks))


def mutual_information(
    ranks: int, bins: int = 32, pairs: int = 1, measured: bool = True, mask_batch: int = 0
) -> Traffic:
    """Of :func:`patchreg.distributed.mutual_information`.

    Args:
        ranks: how many.
        bins: of each image's histogram.
        pairs: batch times channels.
        measured: whether a range has to be found.
        mask_batch: of the mask; 0 without one.
    """
    sent = agreement.traffic(ranks) + Traffic.reducing(NUMBER * pairs * bins**2, ranks)
    sent += _if(measured, Traffic.reducing(NUMBER * pairs * 4, ranks))
    return sent + _if(mask_batch > 0, Traffic.reducing(NUMBER * mask_batch, ranks))


def warp(
    plan: Plan,
    rank: int,
    plane: int,
    ring: Ring | None = None,
    image_gradient: bool = False,
    position_gradient: bool = True,
    common: int = 0,
) -> Traffic:
    """Of :func:`patchreg.distributed.warp`.

    Args:
        plan: the planes that every rank reads.
        rank: whose.
        plane: bytes of a plane of the image.
        ring: how slabs travel, where they do.
        image_gradient: whether the image wants one.
        position_gradient: whether displacement, affine or scale want one.
        common: numbers of affine and scale that want one.
    """
    ranks = plan.partition.ranks
    how: Plan | Ring = plan if ring is None else ring
    sent = agreement.traffic(ranks) + how.traffic(rank, plane)
    sent += _if(ring is not None and position_gradient, how.traffic(rank, plane))
    sent += _if(image_gradient, how.traffic(rank, plane, back=True))
    return sent + _if(common > 0, Traffic.reducing(NUMBER * common, ranks))


def soft_dice(plan: Plan, rank: int, plane: int, labels: int, affine_gradient: bool = False) -> Traffic:
    """Of :func:`patchreg.distributed.soft_dice`, for the planes of the moving labels that every rank reads."""
    ranks = plan.partition.ranks
    sent = agreement.traffic(ranks) + plan.traffic(rank, plane) + Traffic.reducing(NUMBER * 2 * labels, ranks)
    return sent + _if(affine_gradient, Traffic.reducing(NUMBER * 12, ranks))


def _scalar(ranks: int) -> Traffic:
    """A check, and one number that is added up."""
    return agreement.traffic(ranks) + Traffic.reducing(NUMBER, ranks)


def _sum(parts: Sequence[Traffic]) -> Traffic:
    return sum(parts, Traffic())


def _if(condition: bool, sent: Traffic) -> Traffic:
    return sent if condition else Traffic()
