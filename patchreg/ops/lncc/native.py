"""Local normalised cross correlation on the fused kernels, as operators that torch knows.

The volumes are read as they are stored; sums and gradients are formed in float32. Two ways to a gradient:

- ``lncc_sum_stored`` sweeps once and returns the value with the gradients of the sum, which autograd keeps: one volume for
  one image, two for both. Its backward pass scales them.
- ``lncc_sum`` keeps nothing; its backward pass, and that of ``lncc_map``, sweeps again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchreg.ops import cpu
from patchreg.ops.cuda import launch
from patchreg.ops.lncc import cuda
from patchreg.ops.windows import gaussian_kernel
from patchreg.types import Memory, Reduction


def lncc(
    fixed: Tensor,
    moving: Tensor,
    window: int,
    eps: float,
    mask: Tensor | None,
    reduction: Reduction,
    kernel: str,
    memory: Memory,
) -> Tensor:
    """See :func:`patchreg.ops.lncc`."""
    if fixed.dtype != moving.dtype:
        fixed, moving = fixed.float(), moving.float()
    selected = None if mask is None else (mask > 0).to(torch.uint8)
    options = (selected, window, eps, kernel == "gaussian")
    if reduction == "none":
        return lncc_map(fixed, moving, *options)
    to_fixed, to_moving = (torch.is_grad_enabled() and x.requires_grad for x in (fixed, moving))
    if memory == "stored" and (to_fixed or to_moving):
        total = lncc_sum_stored(fixed, moving, *options, to_fixed, to_moving)[0]
    else:
        total = lncc_sum(fixed, moving, *options)
    if reduction == "sum":
        return total
    return total / (fixed.numel() if selected is None else selected.sum() * fixed.shape[1])


@torch.library.custom_op("patchreg::lncc_sum", mutates_args=())
def lncc_sum(fixed: Tensor, moving: Tensor, mask: Tensor | None, window: int, eps: float, gaussian: bool) -> Tensor:
    """The sum over all voxels, a float32 scalar."""
    return _sweep(fixed, moving, mask, None, window, eps, gaussian, False, False)[0]


@torch.library.custom_op("patchreg::lncc_map", mutates_args=())
def lncc_map(fixed: Tensor, moving: Tensor, mask: Tensor | None, window: int, eps: float, gaussian: bool) -> Tensor:
    """The value at every voxel, float32, of the shape of ``fixed``."""
    fixed, moving, mask = _contiguous(fixed, moving, mask)
    if launch.use_cuda(fixed):
        return cuda.value_map(fixed, moving, mask, window, eps, gaussian)
    value_map = torch.empty(fixed.shape, dtype=torch.float32)
    _sweep_on_cpu(fixed, moving, mask, None, window, eps, gaussian, None, None, value_map)
    return value_map


@torch.library.custom_op("patchreg::lncc_sum_stored", mutates_args=())
def lncc_sum_stored(
    fixed: Tensor,
    moving: Tensor,
    mask: Tensor | None,
    window: int,
    eps: float,
    gaussian: bool,
    to_fixed: bool,
    to_moving: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, and its gradients in float32; a gradient that is not wanted is empty."""
    return _sweep(fixed, moving, mask, None, window, eps, gaussian, to_fixed, to_moving)


@torch.library.custom_op("patchreg::lncc_gradients", mutates_args=())
def lncc_gradients(
    upstream: Tensor,
    fixed: Tensor,
    moving: Tensor,
    mask: Tensor | None,
    window: int,
    eps: float,
    gaussian: bool,
    to_fixed: bool,
    to_moving: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients in float32, for an upstream gradient of the sum (a scalar) or of the map."""
    return _sweep(fixed, moving, mask, upstream, window, eps, gaussian, to_fixed, to_moving)[1:]


def _sweep(
    fixed: Tensor,
    moving: Tensor,
    mask: Tensor | None,
    upstream: Tensor | None,
    window: int,
    eps: float,
    gaussian: bool,
    to_fixed: bool,
    to_moving: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    fixed, moving, mask = _contiguous(fixed, moving, mask)
    upstream = None if upstream is None else upstream.float().contiguous()
    if launch.use_cuda(fixed):
        if not (to_fixed or to_moving):
            none = fixed.new_empty(0, dtype=torch.float32)
            return cuda.value(fixed, moving, mask, window, eps, gaussian), none, none.clone()
        found = cuda.value_and_gradients(fixed, moving, mask, upstream, window, eps, gaussian, to_fixed, to_moving)
        total, *grads = found
    else:
        grads = [torch.empty(fixed.shape, dtype=torch.float32) if wanted else None for wanted in (to_fixed, to_moving)]
        total = _sweep_on_cpu(fixed, moving, mask, upstream, window, eps, gaussian, grads[0], grads[1], None)
    first, second = (fixed.new_empty(0, dtype=torch.float32) if grad is None else grad for grad in grads)
    return total, first, second


def _sweep_on_cpu(
    fixed: Tensor,
    moving: Tensor,
    mask: Tensor | None,
    upstream: Tensor | None,
    window: int,
    eps: float,
    gaussian: bool,
    grad_fixed: Tensor | None,
    grad_moving: Tensor | None,
    value_map: Tensor | None,
) -> Tensor:
    weights = gaussian_kernel(window / 6, window // 2, torch.empty(0)) * window if gaussian else None
    total = cpu.extension().lncc(
        *(cpu.address(t) for t in (fixed, moving, mask, upstream)),
        upstream is not None and upstream.ndim > 0,
        *(cpu.address(t) for t in (weights, grad_fixed, grad_moving, value_map)),
        *fixed.shape,
        cpu.STORAGE[fixed.dtype],
        window,
        eps,
        cpu.threads(),
    )
    return torch.tensor(total, dtype=torch.float32)


def _contiguous(fixed: Tensor, moving: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if mask is not None:
        mask = mask.expand(fixed.shape[0], -1, -1, -1, -1).contiguous()
    return fixed.contiguous(), moving.contiguous(), mask


@lncc_sum.register_fake
def _(fixed: Tensor, *_: Any) -> Tensor:
    return fixed.new_empty((), dtype=torch.float32)


@lncc_map.register_fake
def _(fixed: Tensor, *_: Any) -> Tensor:
    return fixed.new_empty(fixed.shape, dtype=torch.float32)


@lncc_sum_stored.register_fake
def _(
    fixed: Tensor, moving: Tensor, mask: Tensor | None, window: int, eps: float, gaussian: bool, *wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (fixed.new_empty((), dtype=torch.float32), *_fake_gradients(fixed, *wanted))


@lncc_gradients.register_fake
def _(upstream: Tensor, fixed: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_gradients(fixed, *rest[-2:])


def _fake_gradients(fixed: Tensor, to_fixed: bool, to_moving: bool) -> tuple[Tensor, Tensor]:
    first, second = (
        fixed.new_empty(fixed.shape if wanted else 0, dtype=torch.float32) for wanted in (to_fixed, to_moving)
    )
    return first, second


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    fixed, moving, mask, *options = inputs
    ctx.save_for_backward(fixed, moving, mask)
    ctx.options = options


def _sweep_again(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    fixed, moving, mask = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    grads = lncc_gradients(upstream, fixed, moving, mask, *ctx.options, *wanted)
    return (*_as_stored(grads, wanted, fixed.dtype), None, None, None, None)


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or autograd would make zeros, of volume size, for the gradients' own gradients
    ctx.wanted, ctx.dtype = inputs[-2:], inputs[0].dtype


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 8
    if torch.is_grad_enabled():
        raise RuntimeError(
            "lncc has no second derivative on its native kernel: use backend='reference' for create_graph=True"
        )
    grads = [upstream * grad for grad in ctx.saved_tensors]
    return (*_as_stored(grads, ctx.wanted, ctx.dtype), None, None, None, None, None, None)


def _as_stored(grads: Any, wanted: Any, dtype: torch.dtype) -> list[Tensor | None]:
    return [grad.to(dtype) if want else None for grad, want in zip(grads, wanted, strict=True)]


lncc_sum.register_autograd(_sweep_again, setup_context=_keep_inputs)
lncc_map.register_autograd(_sweep_again, setup_context=_keep_inputs)
lncc_sum_stored.register_autograd(_scale_gradients, setup_context=_keep_gradients)
