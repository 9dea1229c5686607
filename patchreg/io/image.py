"""An image file in memory: the volume, and what a copy of its kind needs to be written again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import nibabel.spatialimages
import numpy as np
import torch

from patchreg.errors import InputError
from patchreg.io import itk, nifti
from patchreg.spatial import Grid, Volume

log = logging.getLogger(__name__)

Kind = Literal["image", "labels", "mask"]

ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")


@dataclass(frozen=True, eq=False)
class Image:
    """A volume and how its file stores it.

    Args:
        volume: intensities float32, labels int32, masks uint8; (1, I, J, K).
        header: NIfTI header with the orientation codes, units and descriptions to hand on.
        storage: how voxels are stored: dtype, slope and intercept.
        path: where it came from, for messages.
    """

    volume: Volume
    header: nib.Nifti1Header
    storage: nifti.Storage
    path: str


def read_image(source: Any, kind: Kind = "image") -> Image:
    """Read and check an image.

    Args:
        source: a path (NIfTI, MGH, NRRD or MetaImage), a nibabel image, a torchio image, or an :class:`Image`.
        kind: what the voxels are: intensities, labels (whole numbers), or a mask (zero or not).

    Raises:
        InputError: no such file, not an image, not one 3-D volume, NaN or infinite voxels, a constant image, labels
            that are not whole, an empty mask. The message names the file and the remedy.
        GeometryError: an affine that is singular or not finite.
    """
    if isinstance(source, Image):
        return source
    loaded, name = _opened(source)
    data, grid, header, storage = nifti.decode(loaded, name)
    return Image(Volume(_checked(data, kind, name), grid, name), header, storage, name)


def read_grid(source: Any) -> tuple[Grid, nib.Nifti1Header]:
    """Where the voxels of an image lie, and its NIfTI header; whatever the voxels are.

    Args:
        source: as :func:`read_image` takes it.

    Raises:
        InputError: no such file, or not an image.
        GeometryError: an affine that is singular or not finite.
    """
    if isinstance(source, Image):
        return source.volume.grid, source.header
    return nifti.decode_grid(*_opened(source))


def _opened(source: Any) -> tuple[Any, str]:
    """A nibabel image, its voxels perhaps not yet read, and its name."""
    if isinstance(source, (str, Path)):
        path = Path(source)
        try:
            if not path.exists():
                raise InputError(f"{path}: no such file")
            if path.is_dir():
                raise InputError(f"{path}: is a folder; give one image file")
        except PermissionError as error:
            raise InputError(f"{path}: cannot be read (permission denied)") from error
        loaded = itk.read_as_nibabel(path) if path.name.lower().endswith(ITK_SUFFIXES) else nifti.load(path)
        name = str(path)
    elif isinstance(source, nib.spatialimages.SpatialImage):
        loaded, name = source, source.get_filename() or "the nibabel image"
    elif hasattr(source, "data") and hasattr(source, "affine"):  # a torchio image, or one like it
        data = np.asarray(source.data)
        if data.ndim == 4 and data.shape[0] == 1:
            data = data[0]
        loaded = nib.Nifti1Image(data, np.asarray(source.affine, dtype=np.float64))
        name = str(getattr(source, "path", None) or "the torchio image")
    else:
        raise InputError(f"expected a path, a nibabel image or a torchio image, got {type(source).__name__}")
    return loaded, name


def _checked(data: np.ndarray, kind: Kind, name: str) -> torch.Tensor:
    bad = int(data.size - np.isfinite(data).sum())
    if bad:
        raise InputError(f"{name}: {bad} of {data.size} voxels are NaN or infinite; replace them, for example by 0")
    low, high = float(data.min()), float(data.max())
    if kind == "mask":
        if high <= 0 and low >= 0:
            raise InputError(f"{name}: the mask is empty: no voxel is selected")
        return torch.from_numpy((data != 0).astype(np.uint8))[None]
    if kind == "labels":
        whole = np.rint(data)
        if not np.array_equal(whole, data) or max(abs(low), abs(high)) >= 2**31:
            raise InputError(f"{name}: a label map needs whole numbers, but it has others; is it an intensity image?")
        return torch.from_numpy(whole.astype(np.int32))[None]
    if low == high:
        raise InputError(f"{name}: every voxel is {low:g}; a constant image has nothing to register")
    return torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32))[None]


def write_image(path: Path, volume: Volume, like: Image, storage: nifti.Storage | None = None) -> None:
    """Write a volume as NIfTI with the orientation codes and units of another image.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        volume: (1, I, J, K).
        like: whose header is handed on.
        storage: how to store the voxels. None: as the tensor has them.

    Raises:
        InputError: another suffix.
    """
    nifti.write(path, volume.data[0], volume.grid, like.header, storage)
