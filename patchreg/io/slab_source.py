"""An image file of which only some planes are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from patchreg.errors import InputError
from patchreg.io import nifti
from patchreg.io.boxes import Box, Range, sizes, slab_box
from patchreg.io.voxels import DTYPES, Kind, converted
from patchreg.spatial import Grid

SlabKind = Kind | Literal["displacement"]


@dataclass(eq=False)
class SlabSource(ABC):
    """An open image file; :meth:`read` gives any planes of it, and nothing else of it is held.

    The values are those of :func:`~patchreg.io.read_image`, with the same checks made on what is read. What only a whole
    image can tell is not checked: whether it is constant, or its mask empty. Close it after use, or use it in ``with``.
    One object serves one thread; processes may each open the file.

    Args:
        path: of the file.
        kind: what the voxels are; see :func:`~patchreg.io.read_image`. ``"displacement"`` are the vectors of an ITK
            displacement field, read as world RAS mm.
        grid: of the whole image.
        channels: volumes on that grid, or components of a displacement.
        header: NIfTI header with the orientation codes and units to hand on.
        storage: how voxels are stored: dtype, slope and intercept.
    """

    path: Path
    kind: SlabKind
    grid: Grid
    channels: int
    header: nib.Nifti1Header
    storage: nifti.Storage

    @property
    def dtype(self) -> torch.dtype:
        """Of what :meth:`read` gives: float32, int32 for labels, uint8 for masks."""
        return torch.float32 if self.kind == "displacement" else DTYPES[self.kind]

    def read(self, start: int, stop: int, dim: int = 0) -> Tensor:
        """The planes from ``start`` up to, not including, ``stop``.

        Args:
            start: first plane.
            stop: the plane after the last; ``start`` for none.
            dim: array dimension along which planes are counted: 0, 1, 2 for I, J, K.

        Returns:
            (C, I, J, K), with ``stop - start`` voxels along ``dim``.

        Raises:
            InputError: no such planes; voxels that cannot be read, are NaN or infinite, or are not whole in labels.
        """
        if dim not in (0, 1, 2):
            raise InputError(f"{self.path}: planes are counted along dim 0, 1 or 2 of (I, J, K), got {dim}")
        planes = self.grid.shape[dim]
        if not 0 <= start <= stop <= planes:
            raise InputError(f"{self.path}: has planes 0 to {planes} along dim {dim}, not {start} to {stop}")
        box = slab_box(self.grid.shape, start, stop, dim)
        out = torch.empty((self.channels, *sizes(box)), dtype=self.dtype)
        for channels, part in self._parts(box):
            place = out[(channels, *(_within(p, b) for p, b in zip(part, box, strict=True)))]
            place.copy_(self._converted(self._values(channels, part), channels, part))
        return out

    def close(self) -> None:  # noqa: B027  (not every format keeps a file open)
        """Close the file."""

    def __enter__(self) -> SlabSource:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @abstractmethod
    def _parts(self, box: Box) -> Iterator[tuple[slice, Box]]:
        """The pieces of all channels of a box that are best read one after another."""

    @abstractmethod
    def _values(self, channels: slice, box: Box) -> np.ndarray:
        """Values (C, I, J, K) of some channels of a box, scaled."""

    def _converted(self, values: np.ndarray, channels: slice, box: Box) -> Tensor:
        where = f" in [{', '.join(f'{start}:{stop}' for start, stop in box)}]"
        if self.kind != "displacement":
            return converted(values, self.kind, str(self.path), where)
        return converted(values, "image", str(self.path), where) * torch.tensor(nifti.LPS)[channels].reshape(
            -1, 1, 1, 1
        )


def _within(part: Range, whole: Range) -> slice:
    return slice(part[0] - whole[0], part[1] - whole[0])
