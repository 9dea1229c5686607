"""Transforms and images as ITK, ANTs and 3D Slicer have them. Only here is the world LPS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch

from patchreg.errors import InputError, OutputError
from patchreg.io import nifti
from patchreg.io.staging import require_space
from patchreg.spatial import Affine, Composite, DisplacementField, Grid, Transform

FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # RAS <-> LPS

TRANSFORM_SUFFIXES = (".h5", ".hdf5", ".tfm", ".txt", ".mat", ".xfm")


def write_transform(path: Path, transform: Transform) -> None:
    """Write affine maps and displacement fields as an ITK composite transform.

    Args:
        path: ends in ``.h5`` (or ``.tfm``, ``.txt`` where there are no fields).
        transform: affine maps and displacement fields, applied in their order; ITK applies the last added first, which
            is taken care of. Outside a field's grid ITK takes no displacement.

    Raises:
        InputError: another suffix, or a kind of transform that ITK has not.
        OutputError: ITK could not write it, or there is no space for it.
    """
    if not path.name.endswith(TRANSFORM_SUFFIXES):
        raise InputError(f"{path}: transforms are written as ITK files; end the name in .h5")
    parts = Composite([transform]).transforms
    composite = sitk.CompositeTransform(3)
    for part in reversed(parts):
        composite.AddTransform(_to_itk(part))
    numbers = sum(part.displacement_mm.numel() for part in parts if isinstance(part, DisplacementField))
    require_space(path, 8 * numbers + 100_000)  # ITK's HDF5 writer crashes on a full disk
    try:
        sitk.WriteTransform(composite, str(path))
    except RuntimeError as error:
        raise OutputError(f"{path}: ITK could not write the transform ({_reason(error)})") from error
    if not path.exists() or path.stat().st_size == 0:
        raise OutputError(f"{path}: ITK wrote no transform; is the disk full?")


def _to_itk(transform: Transform) -> Any:
    if isinstance(transform, Affine):
        matrix = FLIP @ transform.matrix.detach().numpy() @ FLIP
        affine = sitk.AffineTransform(3)
        affine.SetMatrix(matrix[:3, :3].flatten().tolist())
        affine.SetTranslation(matrix[:3, 3].tolist())
        return affine
    if isinstance(transform, DisplacementField):
        u = transform.displacement_mm.detach().cpu().numpy()[0].transpose(3, 2, 1, 0).astype(np.float64)  # (k, j, i, c)
        image = sitk.GetImageFromArray(u * np.array([-1.0, -1.0, 1.0]), isVector=True)
        affine = FLIP @ transform.grid.affine.numpy()
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        direction = affine[:3, :3] / spacing
        if np.abs(direction.T @ direction - np.eye(3)).max() > 1e-4:
            raise InputError("ITK has no fields on sheared grids: resample the field to an orthogonal one first")
        image.SetOrigin(affine[:3, 3].tolist())
        image.SetSpacing(spacing.tolist())
        image.SetDirection(direction.flatten().tolist())
        return sitk.DisplacementFieldTransform(image)
    raise InputError(
        f"{type(transform).__name__} cannot be written as an ITK transform: make a displacement field of it"
    )


def read_transform(path: Path) -> Composite:
    """Read an ITK transform (``.h5``, ``.tfm``, ``.txt``, ANTs ``.mat``) or an ITK displacement field (NIfTI).

    Returns:
        The chain in the order of its application, world RAS mm. Fields have no displacement outside their grid, as in
        ITK.

    Raises:
        InputError: no such file, not a transform, or of a kind that is neither linear nor a displacement field.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.name.endswith((".nii", ".nii.gz")):
        return Composite([_read_field(path)])
    if not path.name.endswith(TRANSFORM_SUFFIXES):
        raise InputError(
            f"{path}: not a transform; give ITK's .h5, .tfm, .txt or .mat, or a displacement field as .nii.gz"
        )
    try:
        read = sitk.ReadTransform(str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: not an ITK transform ({_reason(error)})") from error
    return Composite([_from_itk(part, path) for part in reversed(_flat(read))])


def _flat(transform: Any) -> list[Any]:
    """Parts of a transform in the order they were added, the last applied first."""
    transform = transform.Downcast()
    if not isinstance(transform, sitk.CompositeTransform):
        return [transform]
    transform.FlattenTransform()
    return [transform.GetNthTransform(i).Downcast() for i in range(transform.GetNumberOfTransforms())]


def _from_itk(transform: Any, path: Path) -> Transform:
    if transform.GetDimension() != 3:
        raise InputError(f"{path}: a {transform.GetDimension()}-D transform; patchreg registers 3-D images")
    if transform.IsLinear():
        origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
        columns = [np.array(transform.TransformPoint(tuple(e))) - origin for e in np.eye(3)]
        matrix = np.eye(4)
        matrix[:3, :3], matrix[:3, 3] = np.stack(columns, axis=1), origin
        return Affine(FLIP @ matrix @ FLIP)
    if isinstance(transform, sitk.DisplacementFieldTransform):
        field = transform.GetDisplacementField()
        affine = np.eye(4)
        affine[:3, :3] = np.array(field.GetDirection()).reshape(3, 3) * np.array(field.GetSpacing())
        affine[:3, 3] = field.GetOrigin()
        vectors = sitk.GetArrayFromImage(field).astype(np.float32) * np.array([-1, -1, 1], dtype=np.float32)
        u = torch.from_numpy(np.ascontiguousarray(vectors.transpose(3, 2, 1, 0)))[None]
        return DisplacementField(Grid(u.shape[2:], FLIP @ affine), u, padding="zeros")
    raise InputError(
        f"{path}: holds a {transform.GetName()}; only linear transforms and displacement fields can be applied"
    )


def _read_field(path: Path) -> DisplacementField:
    image = nifti.load(path)
    if len(image.shape) != 5 or image.shape[3] != 1 or image.shape[4] != 3:
        raise InputError(
            f"{path}: has shape {tuple(image.shape)}, not an ITK displacement field of shape (I, J, K, 1, 3)"
        )
    vectors = image.get_fdata(dtype=np.float32)[:, :, :, 0] * np.array(nifti.LPS, dtype=np.float32)
    if not np.isfinite(vectors).all():
        raise InputError(f"{path}: the displacement has NaN or infinite values")
    u = torch.from_numpy(np.ascontiguousarray(vectors.transpose(3, 0, 1, 2)))[None]
    return DisplacementField(Grid(u.shape[2:], image.affine), u, padding="zeros")


def read_as_nibabel(path: Path) -> nib.Nifti1Image:
    """An image that ITK reads (NRRD, MetaImage) as a nibabel image in RAS.

    Raises:
        InputError: ITK cannot read it.
    """
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise InputError(f"{path}: not a readable image ({_reason(error)})") from error
    array = sitk.GetArrayFromImage(image)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(f"{path}: has shape {array.shape[::-1]}; give one 3-D scalar volume")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    nifti_image = nib.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), FLIP @ affine, dtype=array.dtype)
    nifti_image.header.set_xyzt_units("mm")
    return nifti_image


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
