"""OME-Zarr (OME-NGFF 0.4 and 0.5), read. :mod:`patchreg.io.ome_metadata` says which axis is which world direction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from patchreg.errors import InputError
from patchreg.io import nifti
from patchreg.io.boxes import Box
from patchreg.io.ome_metadata import Multiscale
from patchreg.spatial import Grid
from patchreg.types import Shape3


def is_store(path: Path) -> bool:
    """Whether a folder is a Zarr hierarchy, or is called one."""
    return path.is_dir() and (path.name.endswith(".zarr") or holds_zarr(path))


def holds_zarr(path: Path) -> bool:
    """Whether a folder has the metadata of a Zarr hierarchy."""
    return any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zarray"))


def require_zarr(path: Path) -> Any:
    """The package zarr.

    Raises:
        InputError: it is not installed.
    """
    try:
        import zarr  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise InputError(f"{path}: OME-Zarr needs a package that is not installed: pip install 'zarr>=3'") from error
    return zarr


@dataclass(frozen=True, eq=False)
class OmeImage:
    """A level of an OME-Zarr image, its voxels not yet read.

    Args:
        path: of its group, for messages.
        array: the Zarr array, its dimensions as OME-NGFF orders them.
        grid: where its voxels lie.
        space: which of the array's dimensions are I, J, K.
        channel: which one are the channels.
    """

    path: Path
    array: Any
    grid: Grid
    space: tuple[int, int, int]
    channel: int | None

    @classmethod
    def open(cls, path: Path, level: int = 0) -> OmeImage:
        """Read the metadata of a group.

        Args:
            path: of its folder.
            level: of the pyramid; 0 is the finest.

        Raises:
            InputError: zarr is not installed; no OME-Zarr image; an image that is not three-dimensional.
            GeometryError: an affine that is singular or not finite.
        """
        zarr = require_zarr(path)
        name = str(path)
        try:
            group = zarr.open_group(path, mode="r")
            image = Multiscale.of(group.attrs.asdict(), name)
            array = group[image.path(level)]
        except InputError:
            raise
        except (KeyError, TypeError, *nifti.UNREADABLE) as error:
            raise InputError(f"{name}: not a readable OME-Zarr image ({nifti.first_line(error)})") from error
        if getattr(array, "ndim", 0) != len(image.axes):
            raise InputError(
                f"{name}: level {level} is no array with the {len(image.axes)} axes that its metadata says"
            )
        if array.dtype.kind not in "iufb":
            raise InputError(
                f"{name}: voxels are of type {array.dtype}, not real numbers; convert it to a scalar image"
            )
        time = image.find("time")
        if time is not None and array.shape[time] != 1:
            raise InputError(f"{name}: has {array.shape[time]} time points; give an image of one")
        return cls(path, array, image.grid(level, array.shape), image.space, image.find("channel"))

    @property
    def channels(self) -> int:
        """How many volumes there are."""
        return 1 if self.channel is None else int(self.array.shape[self.channel])

    @property
    def chunks(self) -> Shape3:
        """Voxels (I, J, K) that are compressed together."""
        i, j, k = (int(self.array.chunks[d]) for d in self.space)
        return i, j, k

    @property
    def dtype(self) -> np.dtype[Any]:
        """The nearest type that NIfTI has as well."""
        stored = np.dtype(self.array.dtype)
        return np.dtype({"b1": np.uint8, "f2": np.float32}.get(stored.str[1:], stored)).newbyteorder("=")

    def values(self, box: Box) -> np.ndarray:
        """Values (C, I, J, K) of a box."""
        selection: list[int | slice] = [0] * self.array.ndim  # of a time axis its one entry
        order = []
        if self.channel is not None:
            selection[self.channel] = slice(None)
            order.append(self.channel)
        for d, (start, stop) in zip(self.space, box, strict=True):
            selection[d] = slice(start, stop)
            order.append(d)
        read = np.asarray(self.array[tuple(selection)]).astype(self.dtype, copy=False)
        kept = sorted(order)
        volumes = read.transpose([kept.index(d) for d in order])
        return volumes if self.channel is not None else volumes[None]

    def header(self) -> nib.Nifti1Header:
        """A NIfTI header with the geometry."""
        header = nib.Nifti1Header()
        header.set_xyzt_units("mm")
        header.set_sform(self.grid.affine.numpy(), code=1)
        header.set_qform(self.grid.affine.numpy(), code=1)
        return header


@dataclass(frozen=True, eq=False)
class _Proxy:
    """The voxels for nibabel, which reads them when it is asked for them: (I, J, K), or (I, J, K, C)."""

    image: OmeImage
    is_proxy = True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image.grid.shape if self.image.channels == 1 else (*self.image.grid.shape, self.image.channels)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.image.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        i, j, k = self.image.grid.shape
        values = np.moveaxis(self.image.values(((0, i), (0, j), (0, k))), 0, -1).reshape(self.shape)
        return values if dtype is None else values.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self)[index]


def read_as_nibabel(path: Path) -> nib.Nifti1Image:
    """The finest level as a nibabel image, its voxels not yet read.

    Raises:
        InputError: zarr is not installed; no OME-Zarr image; an image that is not three-dimensional.
        GeometryError: an affine that is singular or not finite.
    """
    image = OmeImage.open(path)
    found = nib.Nifti1Image(_Proxy(image), image.grid.affine.numpy(), image.header(), dtype=image.dtype)
    found.header.set_data_dtype(image.dtype)
    return found
