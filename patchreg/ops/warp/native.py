"""The fused kernels of :func:`patchreg.ops.warp` as custom operators of torch."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from patchreg.ops.cuda import launch
from patchreg.ops.warp import cpu, cuda
from patchreg.ops.warp.job import Gradients, Job
from patchreg.types import Interpolation, Padding, Shape3

_INFINITIES = {
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


def warp(
    image: Tensor,
    displacement: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | float | None,
    shape: Shape3,
    mode: Interpolation,
    padding: Padding,
) -> Tensor:
    """See :func:`patchreg.ops.warp`; every argument is checked and complete here."""
    matrix, step = split_scale(scale)
    return torch.ops.patchreg.warp(image, displacement, affine, matrix, step, shape, mode, padding == "border", False)


def copies(image: Tensor, mode: Interpolation) -> bool:
    """Whether the kernels of the modes that make no new values take images of this dtype."""
    compared = mode == "nearest" or not image.is_floating_point() or image.dtype in _INFINITIES
    return compared and image.element_size() in (1, 2, 4, 8)


def split_scale(scale: Tensor | float | None) -> tuple[Tensor | None, float]:
    """A scale as kernels take it: a matrix, or a number in its place."""
    if isinstance(scale, Tensor):
        return scale, 1.0
    return None, 1.0 if scale is None else scale


def kernels(tensor: Tensor) -> ModuleType:
    """The module whose kernels take ``tensor``: both have the same functions."""
    return cuda if launch.use_cuda(tensor) else cpu


@torch.library.custom_op("patchreg::warp", mutates_args=())
def _warp(
    image: Tensor,
    displacement: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | None,
    step: float,
    shape: Sequence[int],
    mode: str,
    border: bool,
    add: bool,
) -> Tensor:
    job = _job(image, image.shape, displacement, affine, scale, step, shape, mode, border, add)
    out = _empty_output(image, displacement, affine, scale, shape, add)
    if mode == "linear":
        kernels(image).sample(job, out)
    else:
        kernels(image).sample_words(job, out, _INFINITIES.get(image.dtype, 0))
    return out


@_warp.register_fake
def _(
    image: Tensor,
    displacement: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | None,
    step: float,
    shape: Sequence[int],
    mode: str,
    border: bool,
    add: bool,
) -> Tensor:
    return _empty_output(image, displacement, affine, scale, shape, add)


def _empty_output(
    image: Tensor,
    displacement: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | None,
    shape: Sequence[int],
    add: bool,
) -> Tensor:
    dtype = torch.promote_types(image.dtype, displacement.dtype) if add and displacement is not None else image.dtype
    batch = max(t.shape[0] for t in (image, displacement, affine, scale) if t is not None)
    return image.new_empty((batch, image.shape[1], *shape), dtype=dtype)


@torch.library.custom_op("patchreg::warp_backward", mutates_args=())
def _warp_backward(
    upstream: Tensor,
    image: Tensor | None,
    image_shape: Sequence[int],
    image_dtype: torch.dtype,
    displacement: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | None,
    step: float,
    mode: str,
    border: bool,
    add: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    job = _job(image, image_shape, displacement, affine, scale, step, upstream.shape[2:], mode, border, add)
    to_image, to_displacement, to_affine, to_scale = wanted
    module = kernels(upstream)
    gradients = Gradients(
        image=upstream.new_zeros(job.image_shape, dtype=torch.float32) if to_image else None,
        displacement=torch.empty_like(job.displacement) if to_displacement and job.displacement is not None else None,
        affine=torch.zeros_like(job.affine) if to_affine and job.affine is not None else None,
        scale=torch.zeros_like(job.scale) if to_scale and job.scale is not None else None,
    )
    module.differentiate(job, upstream.contiguous(), gradients)
    found = (gradients.image, gradients.displacement, gradients.affine, gradients.scale)
    dtypes = (image_dtype, *(None if t is None else t.dtype for t in (displacement, affine, scale)))
    a, b, c, d = (upstream.new_empty(0) if g is None else g.to(t) for g, t in zip(found, dtypes, strict=True))
    return a, b, c, d


@_warp_backward.register_fake
def _(
    upstream: Tensor,
    image: Tensor | None,
    image_shape: Sequence[int],
    image_dtype: torch.dtype,
    displacement: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | None,
    step: float,
    mode: str,
    border: bool,
    add: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = upstream.new_empty(image_shape if wanted[0] else 0, dtype=image_dtype if wanted[0] else None)
    b, c, d = (
        upstream.new_empty(0) if t is None or not wants else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t, wants in zip((displacement, affine, scale), wanted[1:], strict=True)
    )
    return a, b, c, d


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, displacement, affine, scale, ctx.step, _, ctx.mode, ctx.border, ctx.add = inputs
    ctx.image_shape, ctx.image_dtype = image.shape, image.dtype
    kept = image if any(ctx.needs_input_grad[1:4]) else None  # the image's gradient does not depend on its values
    ctx.save_for_backward(kept, displacement, affine, scale)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    image, displacement, affine, scale = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    found = torch.ops.patchreg.warp_backward(
        upstream, image, ctx.image_shape, ctx.image_dtype, displacement, affine, scale,
        ctx.step, ctx.mode, ctx.border, ctx.add, wanted,
    )  # fmt: skip
    return *(g if wants else None for g, wants in zip(found, wanted, strict=True)), None, None, None, None, None


_warp.register_autograd(_backward, setup_context=_setup_context)


def _job(
    image: Tensor | None,
    image_shape: Sequence[int],
    displacement: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | None,
    step: float,
    shape: Sequence[int],
    mode: str,
    border: bool,
    add: bool,
) -> Job:
    i, j, k = shape
    return Job(
        None if image is None else image.contiguous(),
        tuple(image_shape),
        None if displacement is None else displacement.contiguous(),
        None if affine is None else affine.to(torch.float64).contiguous(),
        None if scale is None else scale.to(torch.float64).contiguous(),
        (i, j, k),
        border,
        step,
        add=add,
        nearest=mode == "nearest",
    )
