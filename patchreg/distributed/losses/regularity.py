"""How rough a split displacement is: :mod:`patchreg.losses.regularity` on many ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.distributed.agreement import agreement
from patchreg.distributed.communication import Group
from patchreg.distributed.losses.arguments import check_slab
from patchreg.distributed.partition import Partition, Span
from patchreg.distributed.windowed import Term, windowed_sum
from patchreg.errors import InputError
from patchreg.types import Spacing3


def diffusion(displacement_mm: Tensor, partition: Partition, spacing_mm: Spacing3, group: Group = None) -> Tensor:
    """``mean |du/dx|^2`` of the whole displacement: :class:`patchreg.losses.Diffusion`, from one plane of each neighbour.

    Args:
        displacement_mm: ``u`` on this rank's slab, (B, 3, I, J, K), in mm.
        partition: of the displacement.
        spacing_mm: of its voxels.
        group: the ranks.

    Returns:
        A scalar, the same on all ranks. The gradient is kept from the forward pass: one slab of the displacement.

    Raises:
        InputError: a slab that is not the partition's, or ranks that disagree.
    """
    return _roughness("diffusion", displacement_mm, partition, spacing_mm, 1, group)


def bending_energy(
    displacement_mm: Tensor, partition: Partition, spacing_mm: Spacing3, scale_mm: float = 1.0, group: Group = None
) -> Tensor:
    """``mean sum_ab |d2u / dx_a dx_b|^2 scale_mm^2``: :class:`patchreg.losses.BendingEnergy`, from two planes of a neighbour.

    Args:
        displacement_mm: ``u`` on this rank's slab, (B, 3, I, J, K), in mm.
        partition: of the displacement.
        spacing_mm: of its voxels.
        scale_mm: the length.
        group: the ranks.

    Returns:
        A scalar, the same on all ranks. The gradient is kept from the forward pass: one slab of the displacement.

    Raises:
        InputError: a slab that is not the partition's, or ranks that disagree.
    """
    return _roughness("bending_energy", displacement_mm, partition, spacing_mm, 2, group) * scale_mm**2


def _roughness(
    name: str, u: Tensor, partition: Partition, spacing_mm: Sequence[float], order: int, group: Group
) -> Tensor:
    """The mean squared derivatives of an order, over all combinations of dimensions."""
    ranks = comm.process_group(group)
    with agreement(name, ranks) as facts:
        check_slab(facts, "displacement", u, partition, ranks, channels=3)
        if len(spacing_mm) != 3 or min(spacing_mm) <= 0:
            raise InputError(f"spacing must be three positive numbers in mm, got {spacing_mm}")
        facts.same(spacing=tuple(spacing_mm))
    shape = [partition.total if dim == partition.dim else u.shape[dim] for dim in (2, 3, 4)]
    term: Term = _Squares(partition.dim, tuple(spacing_mm), order, (shape[0], shape[1], shape[2]))
    value = windowed_sum(term, [u], partition, (0, order), ranks)
    return value.div(u.shape[0] * shape[0] * shape[1] * shape[2]).to(torch.promote_types(u.dtype, torch.float32))


@dataclass(frozen=True)
class _Squares:
    """Squared differences along every one, or every two, of the dimensions, each divided by the part of voxels that have it.

    A difference belongs to the lowest plane that it is made of.
    """

    dim: int
    spacing: tuple[float, ...]
    order: int
    shape: tuple[int, int, int]

    def __call__(self, *pieces: Tensor, core: Span) -> Iterator[Tensor]:
        u = pieces[0].to(torch.promote_types(pieces[0].dtype, torch.float32))
        for axes, times in self._combinations():
            along = axes.count(self.dim - 2)
            end = min(core[1] + along, u.shape[self.dim])  # the piece ends there with the volume
            d = u.narrow(self.dim, core[0], end - core[0])
            for axis in axes:
                d = torch.diff(d, dim=2 + axis) / self.spacing[axis]
            if d.numel():
                parts = [(n - axes.count(axis)) / n for axis, n in enumerate(self.shape)]
                yield d.square().sum(dtype=torch.float64) * (times / (parts[0] * parts[1] * parts[2]))

    def _combinations(self) -> list[tuple[tuple[int, ...], int]]:
        """Axes to differentiate along, and how often that counts."""
        if self.order == 1:
            return [((a,), 1) for a in range(3)]
        return [((a, b), 1 if a == b else 2) for a in range(3) for b in range(a, 3)]
