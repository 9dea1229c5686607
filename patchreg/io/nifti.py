"""NIfTI (and what else nibabel reads)."""

from __future__ import annotations

import io
import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import nibabel.filebasedimages
import nibabel.spatialimages
import numpy as np
from torch import Tensor

from patchreg.errors import GeometryError, InputError
from patchreg.spatial import Grid

log = logging.getLogger(__name__)

VECTOR_INTENT = 1007

LPS = (-1.0, -1.0, 1.0)
"""The signs of displacement components in ITK's files, where those in memory are RAS."""

UNREADABLE = (EOFError, OSError, RuntimeError, ValueError, zlib.error)
"""What libraries raise where voxels cannot be read or decompressed."""


@dataclass(frozen=True)
class Storage:
    """How a file stores intensities: ``value = slope * stored + intercept`` where those are integers."""

    dtype: np.dtype[Any]
    slope: float = 1.0
    intercept: float = 0.0


def load(path: Path) -> Any:
    """The nibabel image of a file, its voxels not yet read.

    Raises:
        InputError: not an image that nibabel can read.
    """
    try:
        return nib.load(path)
    except (
        nib.filebasedimages.ImageFileError,
        nib.spatialimages.HeaderDataError,
        EOFError,
        OSError,
        ValueError,
        zlib.error,
    ) as error:
        raise InputError(
            f"{path}: not a readable image ({first_line(error)}); give NIfTI, MGH, NRRD or MetaImage"
        ) from error


def decode(image: Any, name: str) -> tuple[np.ndarray, Grid, nib.Nifti1Header, Storage]:
    """Voxels (I, J, K), grid, NIfTI header and storage of a nibabel image.

    Raises:
        InputError: not one 3-D volume of real numbers, or voxels that cannot be read.
        GeometryError: an affine that is singular or not finite.
    """
    shape, stored = scalar_volumes(image, name)
    if len(shape) > 3:
        raise InputError(
            f"{name}: has shape {tuple(image.shape)}, {shape[3]} volumes; give one of them, for example cut out with "
            "fslroi or nilearn"
        )
    try:
        data = np.asanyarray(image.dataobj).reshape(shape)
    except UNREADABLE as error:
        raise InputError(
            f"{name}: its voxels cannot be read ({first_line(error)}); the file is cut short or damaged"
        ) from error
    grid, header = decode_grid(image, name)
    slope, intercept = scaling(image)
    return data, grid, header, Storage(stored, slope, intercept)


def scalar_volumes(image: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape (I, J, K) or (I, J, K, ...) without trailing dimensions of one, and the type of the stored voxels.

    Raises:
        InputError: fewer than three dimensions, a single slice, or voxels that are not real numbers.
    """
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) < 3:
        raise InputError(f"{name}: has shape {tuple(image.shape)}, no volumes; give a 3-D image")
    if min(shape[:3]) < 2:
        raise InputError(f"{name}: has shape {shape}, a single slice; give a 3-D image")
    stored = np.dtype(image.get_data_dtype()) if hasattr(image, "get_data_dtype") else np.dtype(image.dataobj.dtype)
    if stored.kind not in "iufb":
        raise InputError(f"{name}: voxels are of type {stored}, not real numbers; convert it to a scalar image")
    return shape, stored


def decode_grid(image: Any, name: str) -> tuple[Grid, nib.Nifti1Header]:
    """Where the voxels of a nibabel image lie, of each volume where there are several, and its NIfTI header.

    Raises:
        InputError: fewer than three dimensions.
        GeometryError: an affine that is singular or not finite.
    """
    if len(image.shape) < 3:
        raise InputError(f"{name}: has shape {tuple(image.shape)}; give a 3-D image")
    header = _nifti_header(image)
    try:
        return Grid(tuple(image.shape[:3]), _affine(image, name)), header
    except GeometryError as error:
        raise GeometryError(f"{name}: {error}") from error


def _affine(image: Any, name: str) -> np.ndarray:
    header = image.header
    if isinstance(header, nib.Nifti1Header):
        q, s = int(header["qform_code"]), int(header["sform_code"])
        if q == 0 and s == 0:
            log.warning("%s: has no orientation (qform and sform codes are 0); its voxel sizes are used, centred", name)
        elif q > 0 and s > 0:
            gap = float(np.abs(header.get_qform() - header.get_sform())[:3].max())
            if gap > 0.01:
                log.warning("%s: its qform and sform differ (by up to %.3g); the sform is used", name, gap)
    if image.affine is None:
        raise GeometryError("it has no affine")
    return np.asarray(image.affine, dtype=np.float64)


def _nifti_header(image: Any) -> nib.Nifti1Header:
    if isinstance(image.header, nib.Nifti1Header):
        return image.header.copy()
    header = nib.Nifti1Header()
    header.set_xyzt_units("mm")
    header.set_sform(image.affine, code=1)
    header.set_qform(image.affine, code=1)
    return header


def scaling(image: Any) -> tuple[float, float]:
    """Slope and intercept of a nibabel image, (1, 0) where it has none that can be used."""
    proxy = image.dataobj
    slope, intercept = getattr(proxy, "slope", 1.0), getattr(proxy, "inter", 0.0)
    usable = np.isfinite(slope) and np.isfinite(intercept) and slope != 0
    return (float(slope), float(intercept)) if usable else (1.0, 0.0)


def write(path: Path, data: Tensor, grid: Grid, like: nib.Nifti1Header, storage: Storage | None = None) -> None:
    """Write (I, J, K) values as NIfTI.

    Args:
        path: ends in ``.nii`` or ``.nii.gz``.
        data: values.
        grid: their place.
        like: header whose orientation codes and units are kept.
        storage: rounded and clipped to this; None stores the tensor as it is.

    Raises:
        InputError: another suffix.
    """
    check_suffix(path)
    array = data.detach().cpu().numpy()
    if storage is not None:
        array = stored(array, storage)
    image = _image(array, grid, like)
    _set_scaling(image.header, storage)
    nib.save(image, path)


def write_vectors(path: Path, displacement_mm: Tensor, grid: Grid, like: nib.Nifti1Header) -> None:
    """Write a displacement (1, 3, I, J, K), RAS mm, as ITK reads it: 5-D, vector intent, components in LPS mm."""
    check_suffix(path)
    array = displacement_mm.detach().cpu().float().numpy()[0].transpose(1, 2, 3, 0)[:, :, :, None]
    array = array * np.array(LPS, dtype=np.float32)
    image = _image(array, grid, like)
    image.header.set_intent(VECTOR_INTENT, name="displacement")
    nib.save(image, path)


def header_bytes(
    channels: int, storage: Storage, grid: Grid, like: nib.Nifti1Header | None, displacement: bool = False
) -> bytes:
    """What precedes the voxels in a file that :func:`write` or :func:`write_vectors` makes.

    Args:
        channels: volumes of the file; with more than one its voxels are (I, J, K, channels).
        storage: how its voxels are stored.
        grid: their place.
        like: header whose orientation codes and units are kept; None: millimetres, aligned to a scanner.
        displacement: the header of a displacement field: (I, J, K, 1, 3), vector intent.

    Raises:
        InputError: NIfTI has no such type of voxels, or not so many voxels along a dimension.
    """
    if like is None:
        like = nib.Nifti1Header()
        like.set_xyzt_units("mm")
    tail = (1, channels) if displacement else (channels,) if channels > 1 else ()
    array = np.broadcast_to(np.zeros((), stored(np.zeros(1), storage).dtype), (*grid.shape, *tail))  # takes no memory
    try:
        header = _image(array, grid, like).header
    except nib.spatialimages.HeaderDataError as error:
        raise InputError(f"NIfTI cannot hold this image ({first_line(error)}); write .ome.zarr") from error
    header.set_slope_inter(1, 0)
    _set_scaling(header, storage)
    if displacement:
        header.set_intent(VECTOR_INTENT, name="displacement")
    stream = io.BytesIO()
    header.write_to(stream)
    return stream.getvalue()


def check_suffix(path: Path) -> None:
    """Raise :class:`InputError` unless the path ends in .nii or .nii.gz."""
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"{path}: images are written as NIfTI; end the name in .nii or .nii.gz")


def _image(array: np.ndarray, grid: Grid, like: nib.Nifti1Header) -> nib.Nifti1Image:
    """An image on a grid with the units and orientation codes of another, stored as the array is."""
    affine, direction = grid.affine.numpy(), grid.direction.numpy()
    image = nib.Nifti1Image(array, affine, dtype=array.dtype)
    image.header.set_xyzt_units(*like.get_xyzt_units())
    code = int(like["sform_code"]) or int(like["qform_code"]) or 1
    orthogonal = bool(np.abs(direction.T @ direction - np.eye(3)).max() < 1e-4)
    image.header.set_sform(affine, code=code)
    image.header.set_qform(affine, code=code if orthogonal else 0, strip_shears=True)
    return image


def _set_scaling(header: nib.Nifti1Header, storage: Storage | None) -> None:
    if storage is not None and storage.dtype.kind != "f" and (storage.slope, storage.intercept) != (1.0, 0.0):
        header.set_slope_inter(storage.slope, storage.intercept)


def stored(values: np.ndarray, storage: Storage) -> np.ndarray:
    """Values as a file stores them: integers rounded and clipped, in the byte order of this machine."""
    if storage.dtype.kind == "f":
        return values.astype(storage.dtype.newbyteorder("="))
    raw = np.rint((values.astype(np.float64) - storage.intercept) / storage.slope)
    limits = np.iinfo(storage.dtype) if storage.dtype.kind in "iu" else None
    if limits is not None:
        raw = raw.clip(limits.min, limits.max)
    return raw.astype(storage.dtype.newbyteorder("=") if storage.dtype.kind in "iu" else np.uint8)


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a sentence."""
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
