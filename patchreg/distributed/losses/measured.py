"""The modules of :mod:`patchreg.losses` on slabs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from patchreg.distributed.losses.overlap import dice_of, label_sums
from patchreg.distributed.losses.regularity import bending_energy, diffusion
from patchreg.distributed.losses.similarity import lncc, mse, mutual_information
from patchreg.distributed.partition import Partition
from patchreg.distributed.sampling import along
from patchreg.errors import UnsupportedSharding
from patchreg.losses import LNCC, MSE, BendingEnergy, Diffusion, MutualInformation, SoftDice
from patchreg.spatial import MappedGrid, Volume
from patchreg.spatial.held import index_map
from patchreg.spatial.linear import apply_linear
from patchreg.types import Spacing3


def measured(loss: Callable[..., Tensor], partition: Partition, group: dist.ProcessGroup, *values: Any) -> Tensor:
    """What a loss gives for whole volumes, from this rank's slabs; the same on all ranks.

    Args:
        loss: one of :mod:`patchreg.losses`.
        partition: of the volumes.
        group: the ranks.
        values: what the loss is called with.

    Raises:
        UnsupportedSharding: a loss that is not known here.
    """
    rule = RULES.get(type(loss))
    if rule is None:
        known = ", ".join(sorted(kind.__name__ for kind in RULES))
        raise UnsupportedSharding(f"the loss {type(loss).__name__} cannot be taken of slabs; those that can: {known}")
    return rule(loss, partition, group, *values)


def _lncc(
    loss: LNCC, partition: Partition, group: dist.ProcessGroup, fixed: Tensor, moved: Tensor, mask: Tensor | None = None
) -> Tensor:
    return 1 - lncc(fixed, moved, partition, loss.window, loss.eps, mask, loss.kernel, loss.backend, group)


def _information(
    loss: MutualInformation,
    partition: Partition,
    group: dist.ProcessGroup,
    fixed: Tensor,
    moved: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    value = mutual_information(
        fixed, moved, partition, loss.bins, mask, loss.window, loss.normalized, backend=loss.backend, group=group
    )
    return 2 - value if loss.normalized else -value


def _mse(
    loss: MSE, partition: Partition, group: dist.ProcessGroup, fixed: Tensor, moved: Tensor, mask: Tensor | None = None
) -> Tensor:
    return mse(fixed, moved, partition, mask, group)


def _diffusion(
    loss: Diffusion, partition: Partition, group: dist.ProcessGroup, displacement_mm: Tensor, spacing_mm: Spacing3
) -> Tensor:
    return diffusion(displacement_mm, partition, spacing_mm, group)


def _bending(
    loss: BendingEnergy, partition: Partition, group: dist.ProcessGroup, displacement_mm: Tensor, spacing_mm: Spacing3
) -> Tensor:
    return bending_energy(displacement_mm, partition, spacing_mm, loss.scale_mm, group)


Points = Sequence[tuple[MappedGrid, Volume]]


def _soft_dice(loss: SoftDice, partition: Partition, group: dist.ProcessGroup, fixed: Points, moving: Points) -> Tensor:
    sums = []
    for (points, labels), (mapped, there) in zip(fixed, moving, strict=True):
        image, held = there.batch, getattr(there.grid, "partition", None)
        affine, scale = index_map(mapped.grid.whole, mapped.matrix, there.grid.whole)
        output: Partition = mapped.grid.partition  # type: ignore[attr-defined]
        if held is not None and held.dim != output.dim:
            image, held, affine, scale = along(output.dim, image, held, affine, scale)
        d = mapped.displacement_mm
        u = None if d is None else apply_linear(scale, d.to(image.device))
        here = points.sample(labels, mode="nearest")
        sums.append(label_sums(here, image, loss.labels, held, u, affine, output, group))
    return dice_of(sums, loss.smooth)


RULES: dict[type, Callable[..., Tensor]] = {
    LNCC: _lncc,
    MutualInformation: _information,
    MSE: _mse,
    Diffusion: _diffusion,
    BendingEnergy: _bending,
    SoftDice: _soft_dice,
}
"""How each loss is taken of slabs."""
