"""The checks that sampling and composition share."""

from __future__ import annotations

import torch
from torch import Tensor

from patchreg.errors import InputError
from patchreg.ops import checks
from patchreg.types import Interpolation, Padding, Shape3


def complete(
    image: Tensor,
    displacement: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | float | None,
    shape: Shape3 | None,
    mode: Interpolation,
    padding: Padding,
) -> tuple[Tensor | None, Tensor | float | None, Shape3]:
    """The affine map as (B or 1, 3, 4), the scale as a number or (B or 1, 3, 3), and the shape of the output.

    Raises:
        InputError: shapes, dtypes or devices that do not go together.
    """
    _check(image, displacement, mode, padding, shape)
    for tensor in (displacement, affine, scale):
        if isinstance(tensor, Tensor):
            checks.same_device("image", image, "the transform", tensor)
    if affine is not None:
        affine = _batched("affine", affine, 4)
    if isinstance(scale, Tensor):
        scale = _batched("scale", scale, 3)
    sizes = {t.shape[0] for t in (image, displacement, affine, scale) if isinstance(t, Tensor)} - {1}
    if len(sizes) > 1:
        raise InputError(f"image, displacement, affine and scale have different batch sizes: {sorted(sizes)}")
    i, j, k = displacement.shape[2:] if displacement is not None else shape or image.shape[2:]
    return affine, scale, (i, j, k)


def _check(image: Tensor, displacement: Tensor | None, mode: str, padding: str, shape: Shape3 | None) -> None:
    if mode not in ("linear", "nearest", "label"):
        raise InputError(f"mode must be 'linear', 'nearest' or 'label', got {mode!r}")
    if padding not in ("zeros", "border"):
        raise InputError(f"padding must be 'zeros' or 'border', got {padding!r}")
    if mode == "linear" or image.ndim != 5 or image.numel() == 0:
        checks.volume("image", image)
    if shape is not None and min(shape) < 1:
        raise InputError(f"shape must be three positive numbers of voxels, got {tuple(shape)}")
    if displacement is not None:
        checks.volume("displacement", displacement, channels=3)
        if shape is not None and tuple(shape) != tuple(displacement.shape[2:]):
            raise InputError(
                f"shape {tuple(shape)} contradicts the displacement's {tuple(displacement.shape[2:])}: give one"
            )


def _batched(name: str, matrix: Tensor, columns: int) -> Tensor:
    if matrix.shape[-2:] != (3, columns) or matrix.ndim not in (2, 3):
        raise InputError(f"{name} must have shape (3, {columns}) or (B, 3, {columns}), got {tuple(matrix.shape)}")
    matrix = matrix if matrix.ndim == 3 else matrix[None]
    return matrix if matrix.is_floating_point() else matrix.to(torch.float64)
