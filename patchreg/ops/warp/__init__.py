"""Sampling an image through an affine map and a displacement, with the identity grid left implicit."""

from __future__ import annotations

import torch
from torch import Tensor

from patchreg.errors import NoGradient
from patchreg.ops.dispatch import is_native
from patchreg.ops.warp import native, reference
from patchreg.ops.warp.arguments import complete
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

    ``x`` runs over the voxels (i, j, k) of the output; voxel centres lie at whole numbers, and no axis is reversed. The
    mode ``"linear"`` has exact gradients to the image, the displacement, the affine map and the scale.

    Native kernels keep nothing of volume size for the backward pass but their inputs, and make nothing but their results;
    the image's gradient is the same from run to run on the CPU, while on a GPU it is added up in no fixed order.

    Args:
        image: (B, C, I, J, K). Integer tensors are taken by the modes ``"nearest"`` and ``"label"`` and keep their dtype.
        displacement: ``u``, (B, 3, i, j, k), components in the order of the array dimensions. None: no displacement.
        affine: ``[A | t]``, (3, 4) or (B, 3, 4), from output voxels to image voxels. None: the identity. Its shifts lose
            nothing in float64, whatever the dtype of the rest.
        scale: ``S``, a number, (3, 3) or (B, 3, 3), applied to ``u``. None: the identity.
        shape: (i, j, k) of the output where there is no displacement. None: the shape of ``image``.
        mode: ``"linear"``; ``"nearest"``; ``"label"``, the label with the most linear weight among the eight
            neighbours, so that a label map stays one. ``"nearest"`` has a gradient to the image alone, ``"label"`` none.
        padding: what lies outside the image: ``"zeros"``, or ``"border"`` for the nearest voxel's value.
        backend: see :mod:`patchreg.ops`.

    Returns:
        (B, C, i, j, k), of the dtype of ``image``. Half precision is interpolated in float32. A position that is NaN
        gives NaN in the mode ``"linear"``; in the others it lies below the image along its axis.

    Raises:
        InputError: shapes, dtypes or devices that do not go together.
        NoGradient: a gradient was asked for in a mode that has none.

    References:
        Jaderberg et al. 2015, arXiv:1506.02025, eq. (3) and (5); Jena et al. 2025, arXiv:2509.25044, sec. 3 for the
        implicit form.
    """
    affine, scale, out = complete(image, displacement, affine, scale, shape, mode, padding)
    wants_image = torch.is_grad_enabled() and image.requires_grad
    if mode != "linear":
        _refuse_gradients(mode, wants_image, [t for t in (displacement, affine, scale) if isinstance(t, Tensor)])
    read = image if mode == "linear" or wants_image or not native.copies(image, mode) else image.new_empty(0).float()
    function = native.warp if is_native("warp", backend, read, displacement) else reference.warp
    return function(image, displacement, affine, scale, out, mode, padding)


def _refuse_gradients(mode: Interpolation, wants_image: bool, positions: list[Tensor]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in positions):
        raise NoGradient(
            f"mode={mode!r} has no gradient to the displacement or affine: use mode='linear', or no_grad()"
        )
    if mode == "label" and wants_image:
        raise NoGradient("mode='label' has no gradient to the image: use mode='linear' or 'nearest', or no_grad()")
