"""An image file that several processes fill, each with its own planes."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from patchreg.errors import InputError, OutputError
from patchreg.io import nifti, staging
from patchreg.io.boxes import Box, slab_box
from patchreg.spatial import Grid
from patchreg.types import Shape3

FLOAT32 = nifti.Storage(np.dtype(np.float32))


@dataclass(frozen=True, eq=False)
class SlabContents:
    """What a file that is written by slabs will hold.

    Args:
        grid: of the whole image.
        channels: volumes on that grid.
        storage: how voxels are stored; integers are rounded and clipped to it.
        like: NIfTI header whose orientation codes and units are kept. None: millimetres, aligned to a scanner.
        displacement: the channels are a displacement (x, y, z) in world RAS mm, to be written as an ITK displacement
            field, as :func:`~patchreg.io.write_vectors` does.

    Raises:
        InputError: no channels; a displacement that has not three or is not stored as floats.
    """

    grid: Grid
    channels: int = 1
    storage: nifti.Storage = FLOAT32
    like: nib.Nifti1Header | None = None
    displacement: bool = False

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise InputError(f"an image needs at least one channel, got {self.channels}")
        if self.displacement and (self.channels != 3 or self.storage.dtype.kind != "f"):
            raise InputError(
                f"a displacement has 3 channels stored as floats, got {self.channels} stored as {self.storage.dtype}"
            )


@dataclass(frozen=True, eq=False)
class SlabSink(ABC):
    """A file under a temporary name that waits for its planes; :func:`~patchreg.io.staged_slabs` makes it.

    It is a few hundred bytes when pickled, so that the process that made it can send it to all others
    (``torch.distributed.broadcast_object_list``, arguments of a process). They all see the file under the same path.

    Args:
        target: the final name.
        staged: the temporary name.
        shape: voxels of the whole image.
        channels: of the image.
        dim: array dimension along which it is cut into slabs.
        storage: how voxels are stored.
        displacement: whether components are turned from RAS to LPS.
    """

    target: Path
    staged: Path
    shape: Shape3
    channels: int
    dim: int
    storage: nifti.Storage
    displacement: bool

    @property
    def multiple(self) -> int:
        """Slabs begin and end at multiples of this many planes, or at the end of the image."""
        return 1

    def write(self, start: int, slab: Tensor) -> None:
        """Write planes, from any process, at any time, each plane once.

        Args:
            start: the first plane along :attr:`dim`.
            slab: (C, I, J, K), on any device, with the voxels of the whole image along the other dimensions. It is
                converted and brought to the host in parts.

        Raises:
            InputError: a slab of another shape, beyond the image, or cut where no slab may be.
            OutputError: it cannot be written, for one because the block that made the sink has ended.
        """
        stop = self._checked_stop(start, slab)
        if stop == start:
            return
        try:
            self._put(slab_box(self.shape, start, stop, self.dim), slab.detach())
            (self._marks / f"{start}-{stop}").touch()
        except OSError as error:
            if not self._marks.exists():
                shutil.rmtree(self.staged.parent, ignore_errors=True)  # Zarr makes folders that are not there
                raise OutputError(f"{self.target}: was given up by the process that began it") from error
            raise OutputError(staging.message(self.target, error)) from error

    def check_complete(self) -> None:
        """Raise :class:`OutputError` unless every plane has been written once."""
        found = sorted((int(a), int(b)) for a, b in (p.name.split("-") for p in self._marks.iterdir()))
        ends = [(0, 0), *found, (self.shape[self.dim],) * 2]
        for (_, before), (start, _) in pairwise(ends):
            if before != start:
                what = "never written" if before < start else "written twice"
                a, b = sorted((before, start))
                raise OutputError(f"{self.target}: planes {a} to {b} along dim {self.dim} were {what}; nothing is kept")

    def begin(self) -> None:
        """Prepare the staged file: its header and its space. For the one process that makes the sink."""
        self._marks.mkdir()
        self._create()

    def finish(self) -> None:
        """Make the staged file whole, when every process has written its planes."""
        self.check_complete()

    @property
    def _marks(self) -> Path:
        """A folder with a file for every slab written: unlike bytes in one file, safe on any file system."""
        return self.staged.parent / "slabs"

    @abstractmethod
    def _create(self) -> None: ...

    @abstractmethod
    def _put(self, box: Box, slab: Tensor) -> None: ...

    def _stored(self, values: Tensor) -> np.ndarray:
        """Values (C, I, J, K) as the file stores them."""
        if values.dtype == torch.bfloat16:
            values = values.float()
        array = values.cpu().numpy()
        if self.displacement:
            array = array * np.array(nifti.LPS, dtype=np.float32).reshape(3, 1, 1, 1)
        return nifti.stored(array, self.storage)

    def _checked_stop(self, start: int, slab: Tensor) -> int:
        expected: list[int | str] = [self.channels, *self.shape]
        expected[1 + self.dim] = "planes"
        if slab.ndim != 4 or any(n not in ("planes", m) for n, m in zip(expected, slab.shape, strict=True)):
            raise InputError(
                f"{self.target}: a slab along dim {self.dim} has shape ({', '.join(map(str, expected))}), "
                f"got {tuple(slab.shape)}"
            )
        planes, stop = self.shape[self.dim], start + slab.shape[1 + self.dim]
        if not 0 <= start <= stop <= planes:
            raise InputError(f"{self.target}: has planes 0 to {planes} along dim {self.dim}, not {start} to {stop}")
        if stop > start and (start % self.multiple or (stop % self.multiple and stop != planes)):
            raise InputError(
                f"{self.target}: its chunks have {self.multiple} planes along dim {self.dim}, and two processes must not "
                f"write into one; planes {start} to {stop} cut through them: name the cuts when making the file"
            )
        return stop


def local_index(part: Box, box: Box) -> tuple[slice, ...]:
    """Where a part of a box lies in a tensor (C, I, J, K) of the box."""
    return (slice(None), *(slice(a - c, b - c) for (a, b), (c, _) in zip(part, box, strict=True)))
