"""An image file in memory: the volume, and what a copy of its kind needs to be written again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import nibabel.spatialimages
import numpy as np
import torch

from patchreg.errors import InputError
from patchreg.io import itk, nifti, omezarr
from patchreg.io.voxels import Kind, converted
from patchreg.spatial import Grid, Volume

log = logging.getLogger(__name__)

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
        source: a path (NIfTI, MGH, NRRD, MetaImage, or the folder of an OME-Zarr image), a nibabel image, a torchio
            image, or an :class:`Image`.
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
            if path.is_dir() and not omezarr.is_store(path):
                raise InputError(f"{path}: is a folder; give one image file")
        except PermissionError as error:
            raise InputError(f"{path}: cannot be read (permission denied)") from error
        if path.is_dir():
            loaded = omezarr.read_as_nibabel(path)
        elif path.name.lower().endswith(ITK_SUFFIXES):
            loaded = itk.read_as_nibabel(path)
        else:
            loaded = nifti.load(path)
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
    tensor = converted(data, kind, name)[None]
    if kind == "mask" and not bool(tensor.any()):
        raise InputError(f"{name}: the mask is empty: no voxel is selected")
    if kind == "image" and float(data.min()) == float(data.max()):
        raise InputError(f"{name}: every voxel is {float(data.min()):g}; a constant image has nothing to register")
    return tensor


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
