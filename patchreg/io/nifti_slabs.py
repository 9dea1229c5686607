"""NIfTI by slabs.

A NIfTI file has I fastest and K slowest (Fortran order), a volume after the other. So planes along K are one run of bytes,
planes along J one run in every K, and planes along I a short run in every (J, K):

- Reading takes runs along K and J alone from the file. For planes along I it takes all of the file, in parts, and keeps
  what was asked for: runs of a few hundred bytes share the disk's pages with their neighbours anyway.
- Writing takes one call a run. For planes along I the runs are too short for a call each: the file is mapped into memory,
  some K at a time, and the system writes its pages, shared with the other processes of the machine.

Files are read and not mapped: a map counts as memory of the process for as long as it is there, and a file that turns out
to be cut short ends the process instead of raising.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.openers import Opener
from nibabel.volumeutils import apply_read_scaling
from torch import Tensor

from patchreg.errors import InputError
from patchreg.io import nifti
from patchreg.io.boxes import Box, parts, sizes
from patchreg.io.slab_sink import SlabContents, SlabSink, local_index
from patchreg.io.slab_source import SlabKind, SlabSource
from patchreg.io.staging import reserve
from patchreg.types import Shape3


@dataclass(eq=False)
class NiftiSource(SlabSource):
    """Planes of a NIfTI file, or of an MGH file, which is laid out alike.

    Of a compressed file everything before the planes has to be read and unpacked: planes that are read in the order of
    the file, along K, cost one pass over it in all; planes along I or J one pass each time. Where the package
    indexed_gzip is installed, nibabel uses it, and going back to planes read before is fast.
    """

    proxy: Any
    holder: Any
    _file: Any = None
    _owner: int = 0

    @classmethod
    def open(cls, path: Path, kind: SlabKind) -> NiftiSource:
        """Read the header.

        Raises:
            InputError: not an image, or none that can be read by planes.
            GeometryError: an affine that is singular or not finite.
        """
        image, name = nifti.load(path), str(path)
        shape, dtype = nifti.scalar_volumes(image, name)
        if type(image.dataobj) is not ArrayProxy or image.dataobj.order != "F":
            raise InputError(f"{name}: this format cannot be read by planes; convert it to .nii or .ome.zarr")
        if kind == "displacement" and (len(shape) != 5 or shape[3:] != (1, 3)):
            raise InputError(f"{name}: has shape {tuple(image.shape)}, not an ITK displacement field (I, J, K, 1, 3)")
        if kind != "displacement" and len(shape) > 4:
            raise InputError(f"{name}: has shape {tuple(image.shape)}; give a 3-D image, or one of several channels")
        grid, header = nifti.decode_grid(image, name)
        storage = nifti.Storage(dtype, *nifti.scaling(image))
        holder = image.file_map["image"]
        return cls(path, kind, grid, int(np.prod(shape[3:])), header, storage, image.dataobj, holder)

    def close(self) -> None:
        if self._file is not None and self._owner == os.getpid():
            self._file.close()
        self._file = None

    def _parts(self, box: Box) -> Iterator[tuple[slice, Box]]:
        """In the order of the file, so that a compressed one is gone through once."""
        for channel in range(self.channels):
            for part in _whole_rows(box, self.grid.shape):
                yield slice(channel, channel + 1), part

    def _values(self, channels: slice, box: Box) -> np.ndarray:
        (i0, i1), (j0, j1), (k0, k1) = box
        I, J, K = self.grid.shape
        dtype = self.proxy.dtype
        raw = np.empty((k1 - k0, j1 - j0, I), dtype=dtype)
        runs = 1 if j1 - j0 == J else k1 - k0  # planes that are whole follow each other
        try:
            file = self._opened()
            for k, run in enumerate(raw.reshape(runs, -1)):
                voxel = ((channels.start * K + k0 + k) * J + j0) * I
                _read_into(file, self.proxy.offset + voxel * dtype.itemsize, run)
        except nifti.UNREADABLE as error:
            self.close()
            raise InputError(
                f"{self.path}: its voxels cannot be read ({nifti.first_line(error)}); the file is cut short or damaged"
            ) from error
        slope, intercept = np.asanyarray(self.proxy.slope), np.asanyarray(self.proxy.inter)
        if self.kind == "displacement":
            slope, intercept = slope.astype(np.float32), intercept.astype(np.float32)
        return apply_read_scaling(raw[..., i0:i1].transpose(2, 1, 0)[None], slope, intercept)

    def _opened(self) -> Any:
        """The open file. A process that was forked off opens its own, as the position in the file is shared."""
        if self._file is None or self._owner != os.getpid():
            self._file, self._owner = self.holder.get_prepare_fileobj("rb", keep_open=True), os.getpid()
        return self._file


def _whole_rows(box: Box, shape: Shape3, channels: int = 1) -> Iterator[Box]:
    """Cut a box along K, into parts that are small even with all of I, of which the file gives or takes no less."""
    if box[0][0] < box[0][1]:
        for part in parts(((0, shape[0]), box[1], box[2]), (*shape[:2], 1), channels):
            yield box[0], part[1], part[2]


def _read_into(file: Any, position: int, array: np.ndarray) -> None:
    file.seek(position)
    view, done = array.view(np.uint8).data, 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise EOFError(f"{len(view) - done} bytes are missing")
        done += count


@dataclass(frozen=True, eq=False)
class NiftiSink(SlabSink):
    """A ``.nii`` file whose header is written and whose space is taken at once."""

    header: bytes

    @classmethod
    def make(cls, target: Path, staged: Path, contents: SlabContents, dim: int) -> Self:
        """What :func:`~patchreg.io.staged_slabs` starts from.

        Raises:
            InputError: NIfTI cannot hold such an image.
        """
        c = contents
        header = nifti.header_bytes(c.channels, c.storage, c.grid, c.like, c.displacement)
        return cls(target, staged, c.grid.shape, c.channels, dim, c.storage, c.displacement, header)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the voxels in the file."""
        return nifti.stored(np.zeros(1), self.storage).dtype

    def _create(self) -> None:
        voxels = self.channels * int(np.prod(self.shape))
        with open(self.staged, "wb") as file:
            reserve(file, self.staged.parent, len(self.header) + voxels * self.dtype.itemsize)
            file.write(self.header)

    def _put(self, box: Box, slab: Tensor) -> None:
        with open(self.staged, "r+b") as file:
            for part in _whole_rows(box, self.shape, self.channels):
                values = self._stored(slab[local_index(part, box)])
                for c in range(self.channels):
                    if self.dim == 0:
                        self._map(c, part)[part[0][0] : part[0][1]] = values[c]
                    else:
                        self._write_runs(file, c, part, values[c])

    def _write_runs(self, file: Any, channel: int, part: Box, values: np.ndarray) -> None:
        planes = np.ascontiguousarray(values.transpose(2, 1, 0))
        runs = 1 if sizes(part)[1] == self.shape[1] else len(planes)
        for k, run in enumerate(planes.reshape(runs, -1)):
            file.seek(self._position(channel, part[2][0] + k) + part[1][0] * self.shape[0] * self.dtype.itemsize)
            file.write(run.data)

    def _map(self, channel: int, part: Box) -> np.ndarray:
        position = self._position(channel, part[2][0])
        shape: Shape3 = (*self.shape[:2], part[2][1] - part[2][0])
        return np.memmap(self.staged, self.dtype, "r+", position, shape, order="F")

    def _position(self, channel: int, k: int) -> int:
        plane = self.shape[0] * self.shape[1] * self.dtype.itemsize
        return len(self.header) + (channel * self.shape[2] + k) * plane


@dataclass(frozen=True, eq=False)
class CompressedNiftiSink(NiftiSink):
    """A ``.nii.gz`` file. Every slab is compressed to a file of its own, by the process that has it; in the end they are put
    one after the other, as a sequence of compressed files is one compressed file. Planes along K alone can be that.
    """

    @classmethod
    def make(cls, target: Path, staged: Path, contents: SlabContents, dim: int) -> Self:
        """What :func:`~patchreg.io.staged_slabs` starts from.

        Raises:
            InputError: NIfTI cannot hold such an image, or slabs along another dimension than the last.
        """
        if dim != 2:
            raise InputError(
                f"{target}: compressed NIfTI can only be written by slabs along the last dimension, not along dim {dim}; "
                "write .nii or .ome.zarr"
            )
        return super().make(target, staged, contents, dim)

    def finish(self) -> None:
        super().finish()
        with open(self.staged, "ab") as whole:
            for channel in range(self.channels):
                for piece in sorted(self.staged.parent.glob(f"piece-{channel}-*")):
                    with open(piece, "rb") as file:
                        shutil.copyfileobj(file, whole, 2**20)
                    piece.unlink()

    def _create(self) -> None:
        with _compressed(self.staged) as file:
            file.write(self.header)

    def _put(self, box: Box, slab: Tensor) -> None:
        pieces = [self.staged.parent / f"piece-{channel}-{box[2][0]:012d}" for channel in range(self.channels)]
        with ExitStack() as stack:
            files = [stack.enter_context(_compressed(piece)) for piece in pieces]
            for part in _whole_rows(box, self.shape, self.channels):
                for file, values in zip(files, self._stored(slab[local_index(part, box)]), strict=True):
                    file.write(np.ascontiguousarray(values.transpose(2, 1, 0)).data)


@contextmanager
def _compressed(path: Path) -> Iterator[gzip.GzipFile]:
    """A new gzip file as nibabel makes them: fast, and with neither name nor time, so that equal images are equal files."""
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", Opener.default_compresslevel, raw, mtime=0) as file:
        yield file
