"""The images of a registration, read as a whole or, by several processes, each its slab."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import torch.distributed as dist
from torch import Tensor

from patchreg.distributed.slab import Slab, split_volume
from patchreg.errors import InputError
from patchreg.inference.ranks import Ranks
from patchreg.io import Image, Kind, SlabKind, Storage, open_slabs, read_image, read_transform
from patchreg.spatial import DisplacementField, Grid, Transform, Volume


@dataclass(frozen=True)
class Images:
    """What was given, each image on a grid of its own, which may be a :class:`Slab`."""

    fixed: Image
    moving: Image
    fixed_mask: Image | None
    moving_mask: Image | None
    moving_labels: Image | None


def read_images(fixed: Any, moving: Any, fixed_mask: Any, moving_mask: Any, moving_labels: Any, ranks: Ranks) -> Images:
    """Read and check a pair, and what belongs to it.

    Raises:
        InputError: a file that cannot be used; on all ranks, whichever of them found out.
    """

    first = read_part(fixed, "image", ranks)

    def optional(source: Any, kind: Literal["mask", "labels"]) -> Image | None:
        return None if source is None else read_part(source, kind, ranks, first.volume.grid)

    return Images(
        first,
        read_part(moving, "image", ranks, first.volume.grid),
        optional(fixed_mask, "mask"),
        optional(moving_mask, "mask"),
        optional(moving_labels, "labels"),
    )


def read_part(source: Any, kind: Kind, ranks: Ranks, beside: Grid | None = None) -> Image:
    """:func:`patchreg.io.read_image`, of which every rank holds its slab: of a file nothing else is read.

    What is in memory is cut: every rank must have been given it whole. An image on a slab is taken as it is.

    Args:
        source: a path, or an image in memory.
        kind: what the voxels are.
        ranks: who hold it.
        beside: a grid that is shared out already: this one is cut across the same direction of the world, so that what
            lies together is held together.
    """
    if ranks.group is None:
        return read_image(source, kind)
    with ranks.together():
        along = beside.across if isinstance(beside, Slab) else None
        read = _from_file if isinstance(source, (str, Path)) else _cut
        image = read(source, kind, ranks.group, along)
    _check_whole(image, kind)
    return image


def read_initial(given: str | Path | Transform | None, ranks: Ranks) -> Transform | None:
    """An initial transform. A displacement field in a NIfTI file is read by slabs, any other file by every rank."""
    if not isinstance(given, (str, Path)):
        return given
    with ranks.together():
        if ranks.group is None or not str(given).endswith((".nii", ".nii.gz")):
            return read_transform(Path(given))
        field, _, _ = _planes(Path(given), "displacement", ranks.group, None)
        return DisplacementField(field.grid, field.batch, padding="zeros")


def _from_file(path: str | Path, kind: Kind, group: dist.ProcessGroup, along: Tensor | None) -> Image:
    volume, header, storage = _planes(Path(path), kind, group, along)
    if volume.data.shape[0] != 1:
        raise InputError(f"{path}: has {volume.data.shape[0]} volumes; give one of them")
    return Image(volume, header, storage, str(path))


def _planes(
    path: Path, kind: SlabKind, group: dist.ProcessGroup, along: Tensor | None
) -> tuple[Volume, nib.Nifti1Header, Storage]:
    """This rank's planes of a file, and how it stores them."""
    with open_slabs(path, kind) as file:
        grid, dim = Slab.of(file.grid, group, along=along), 0
        span = (0, file.grid.shape[0])
        if isinstance(grid, Slab):
            span, dim = grid.partition.bounds(grid.rank), grid.partition.dim - 2
        return Volume(file.read(*span, dim), grid, str(path)), file.header, file.storage


def _cut(source: Any, kind: Kind, group: dist.ProcessGroup, along: Tensor | None) -> Image:
    image = read_image(source, kind)
    if image.volume.grid.is_part:
        return image
    return replace(image, volume=split_volume(image.volume, group, along=along))


def _check_whole(image: Image, kind: Kind) -> None:
    """What no rank can tell from its slab; the same on all."""
    data, grid = image.volume.data, image.volume.grid
    low, high = -float(grid.largest(-data.min().float())), float(grid.largest(data.max().float()))
    if kind == "mask" and high == 0:
        raise InputError(f"{image.path}: the mask is empty: no voxel is selected")
    if kind == "image" and low == high:
        raise InputError(f"{image.path}: every voxel is {low:g}; a constant image has nothing to register")
