"""Sampling an image through an affine map and a displacement, with the identity grid left implicit."""

from __future__ import annotations

import torch
from torch import Tensor

from patchreg.errors import InputError, NoGradient
from patchreg.ops import checks
from patchreg.ops.dispatch import choose
from patchreg.ops.warp import reference
from patchreg.types import Backend, Interpolation, Padding, Shape3


def warp(
    image: Tensor,
    displacement: Tensor | None = None,
    affine: Tensor | None = None,
    scale: Tensor | float | None = None,
    shape: Shape3 | None = None,
    mode: Interpolation = "linear",
    padding: Padding = "zeros",
    backend: Backend = "auto",
) -> Tensor:
    """Sample ``image`` at ``A x + t + S u(x)``, in index coordinates of the image.

    ``x`` runs over the voxels (i, j, k) of the output; voxel centres lie at whole numbers, and no axis is reversed.

    Args:
        image: (B, C, I, J, K). Integer tensors are taken by the modes ``"nearest"`` and ``"label"`` and keep their dtype.
        displacement: ``u``, (B, 3, i, j, k), components in the order of the array dimensions. None: no displacement.
        affine: ``[A | t]``, (3, 4) or (B, 3, 4), from output voxels to image voxels. None: the identity.
        scale: ``S``, a number, (3, 3) or (B, 3, 3), applied to ``u``. None: the identity.
        shape: (i, j, k) of the output where there is no displacement. None: the shape of ``image``.
        mode: ``"linear"``; ``"nearest"``; ``"label"``, the label with the most linear weight among the eight
            neighbours, so that a label map stays one.
        padding: what lies outside the image: ``"zeros"``, or ``"border"`` for the nearest voxel's value.
        backend: see :mod:`patchreg.ops`.

    Returns:
        (B, C, i, j, k), of the dtype of ``image``. Half precision is interpolated in float32.

    Raises:
        InputError: shapes, dtypes or devices that do not go together.
        NoGradient: a gradient to the position was asked for in a mode that has none.

    References:
        Jaderberg et al. 2015, arXiv:1506.02025, eq. (3) and (5); Jena et al. 2025, arXiv:2509.25044, sec. 3 for the
        implicit form.
    """
    positions = [t for t in (displacement, affine, scale) if isinstance(t, Tensor)]
    _check(image, displacement, mode, padding, shape)
    for tensor in positions:
        checks.same_device("image", image, "the transform", tensor)
    if mode != "linear" and torch.is_grad_enabled() and any(t.requires_grad for t in positions):
        raise NoGradient(
            f"mode={mode!r} has no gradient to the displacement or affine: use mode='linear', or no_grad()"
        )
    out = tuple(displacement.shape[2:]) if displacement is not None else tuple(shape or image.shape[2:])
    dtype = (
        displacement.dtype if displacement is not None else image.dtype if image.is_floating_point() else torch.float32
    )
    dtype = torch.promote_types(dtype, torch.float32)
    if affine is None:
        affine = torch.eye(3, 4, dtype=dtype, device=image.device)
    matrix = _batched("affine", affine, 4).to(torch.promote_types(affine.dtype, torch.float32))
    if scale is not None:
        scale = scale if isinstance(scale, Tensor) else torch.eye(3, dtype=dtype, device=image.device) * scale
        scale = _batched("scale", scale, 3)
    sizes = {t.shape[0] for t in (image, displacement, matrix, scale) if t is not None} - {1}
    if len(sizes) > 1:
        raise InputError(f"image, displacement, affine and scale have different batch sizes: {sorted(sizes)}")
    function = choose("warp", backend, reference.warp, None)
    return function(image, displacement, matrix, scale, out, mode, padding)  # type: ignore[arg-type]


def _check(image: Tensor, displacement: Tensor | None, mode: str, padding: str, shape: Shape3 | None) -> None:
    if mode not in ("linear", "nearest", "label"):
        raise InputError(f"mode must be 'linear', 'nearest' or 'label', got {mode!r}")
    if padding not in ("zeros", "border"):
        raise InputError(f"padding must be 'zeros' or 'border', got {padding!r}")
    if mode == "linear" or image.ndim != 5:
        checks.volume("image", image)
    if displacement is not None:
        checks.volume("displacement", displacement, channels=3)
        if shape is not None and tuple(shape) != tuple(displacement.shape[2:]):
            raise InputError(
                f"shape {tuple(shape)} contradicts the displacement's {tuple(displacement.shape[2:])}: give one"
            )


def _batched(name: str, matrix: Tensor, columns: int) -> Tensor:
    if matrix.shape[-2:] != (3, columns) or matrix.ndim not in (2, 3):
        raise InputError(f"{name} must have shape (3, {columns}) or (B, 3, {columns}), got {tuple(matrix.shape)}")
    return matrix if matrix.ndim == 3 else matrix[None]
