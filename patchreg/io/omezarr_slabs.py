"""OME-Zarr by slabs: only the chunks that hold the planes are read, and every process writes chunks of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from patchreg.errors import InputError
from patchreg.io import nifti
from patchreg.io.boxes import Box, chunk_shape, parts
from patchreg.io.ome_metadata import attributes_of
from patchreg.io.omezarr import OmeImage, require_zarr
from patchreg.io.slab_sink import SlabContents, SlabSink, local_index
from patchreg.io.slab_source import SlabKind, SlabSource
from patchreg.types import Shape3


@dataclass(eq=False)
class OmeZarrSource(SlabSource):
    """Planes of an OME-Zarr image: the chunks that they lie in are read and unpacked, some of them at a time."""

    image: OmeImage

    @classmethod
    def open(cls, path: Path, kind: SlabKind, level: int) -> OmeZarrSource:
        """Read the metadata.

        Raises:
            InputError: see :meth:`OmeImage.open`; displacements.
            GeometryError: an affine that is singular or not finite.
        """
        if kind == "displacement":
            raise InputError(f"{path}: OME-Zarr has no displacement fields; give an ITK displacement field as .nii")
        image = OmeImage.open(path, level)
        if min(image.grid.shape) < 2:
            raise InputError(f"{path}: has shape {image.grid.shape}, a single slice; give a 3-D image")
        return cls(path, kind, image.grid, image.channels, image.header(), nifti.Storage(image.dtype), image)

    def _parts(self, box: Box) -> Iterator[tuple[slice, Box]]:
        return ((slice(None), part) for part in parts(box, self.image.chunks, self.channels))

    def _values(self, channels: slice, box: Box) -> np.ndarray:
        try:
            return self.image.values(box)
        except nifti.UNREADABLE as error:
            raise InputError(
                f"{self.path}: its voxels cannot be read ({nifti.first_line(error)}); a chunk is cut short or damaged"
            ) from error


@dataclass(frozen=True, eq=False)
class OmeZarrSink(SlabSink):
    """An OME-NGFF 0.5 image of one level, whose chunks end where slabs do."""

    attributes: dict[str, Any]
    chunks: Shape3

    @classmethod
    def make(cls, target: Path, staged: Path, contents: SlabContents, dim: int, cuts: Sequence[int]) -> Self:
        """What :func:`~patchreg.io.staged_slabs` starts from.

        Raises:
            InputError: zarr is not installed; a displacement, or a scaling of integers.
        """
        require_zarr(target)
        c = contents
        if c.displacement:
            raise InputError(f"{target}: OME-Zarr has no displacement fields; write .nii")
        if c.storage.dtype.kind != "f" and (c.storage.slope, c.storage.intercept) != (1.0, 0.0):
            raise InputError(
                f"{target}: OME-Zarr has no slope and intercept for integers; store float32, or write .nii"
            )
        chunks = chunk_shape(c.grid.shape, dim, gcd(*(cut for cut in cuts if cut < c.grid.shape[dim])))
        attributes = attributes_of(c.grid, c.channels, target)
        return cls(target, staged, c.grid.shape, c.channels, dim, c.storage, False, attributes, chunks)

    @property
    def multiple(self) -> int:
        return self.chunks[self.dim]

    def _create(self) -> None:
        zarr = require_zarr(self.target)
        group = zarr.open_group(self.staged, mode="w-", zarr_format=3, attributes=self.attributes)
        lead = (self.channels,) if self.channels > 1 else ()
        group.create_array(
            "0",
            shape=(*lead, *self.shape[::-1]),
            chunks=(*(1 for _ in lead), *self.chunks[::-1]),
            dtype=nifti.stored(np.zeros(1), self.storage).dtype,
            dimension_names=[axis["name"] for axis in self.attributes["ome"]["multiscales"][0]["axes"]],
        )

    def _put(self, box: Box, slab: Tensor) -> None:
        array = require_zarr(self.target).open_array(self.staged / "0", mode="r+")
        for part in parts(box, self.chunks, self.channels):
            values = self._stored(slab[local_index(part, box)]).transpose(0, 3, 2, 1)
            place = tuple(slice(start, stop) for start, stop in part[::-1])
            if self.channels > 1:
                array[(slice(None), *place)] = values
            else:
                array[place] = values[0]
