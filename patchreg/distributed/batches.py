"""The volumes of a batch, shared out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from patchreg.distributed.agreement import agreement
from patchreg.distributed.slab import split_volume
from patchreg.errors import InputError
from patchreg.spatial import Grid, Volume


def share_out(batch: Any, group: dist.ProcessGroup) -> Any:
    """A batch in which every volume is this rank's slab of it; one with fewer than two planes for each rank stays whole.

    Args:
        batch: the same on all ranks; volumes in lists, tuples, mappings and dataclasses of any depth.
        group: the ranks.

    Raises:
        InputError: the ranks were given different volumes, or volumes that are all too thin.
    """
    found: list[Volume] = []
    with agreement("the next batch", group) as facts:
        replaced(batch, partial(_note, found))
        for number, volume in enumerate(found):
            place = volume.grid.affine.tolist()
            facts.same(**{f"volume {number}": f"{volume.name} {tuple(volume.data.shape)} at {place}"})
    along = max_direction(found[0].grid) if found else None  # all cut the same way: they then reach fewer ranks
    split = {id(volume): split_volume(volume, group, along=along) for volume in found}
    if found and not any(volume.grid.is_part for volume in split.values()):
        shapes = ", ".join(f"{volume.name or 'a volume'} of {volume.grid.shape}" for volume in found)
        raise InputError(
            f"{shapes}: fewer than two planes for each of {dist.get_world_size(group)} ranks; take smaller grids"
        )
    return replaced(batch, lambda volume: split[id(volume)])


def max_direction(grid: Grid) -> Tensor:
    """(3,): the direction in the world along which a grid has most voxels."""
    return grid.direction[:, grid.shape.index(max(grid.shape))]


def replaced(batch: Any, by: Callable[[Volume], Volume]) -> Any:
    """A batch with every volume in it replaced."""
    again = partial(replaced, by=by)
    if isinstance(batch, Volume):
        return by(batch)
    if isinstance(batch, Mapping):
        return {key: again(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(again, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(again, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.init}
        found = {name: again(value) for name, value in fields.items()}
        changed = {name: value for name, value in found.items() if value is not fields[name]}
        return dataclasses.replace(batch, **changed) if changed else batch
    return batch


def _note(found: list[Volume], volume: Volume) -> Volume:
    found.append(volume)
    return volume
