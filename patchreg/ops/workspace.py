"""What the fused kernels take inside themselves, which nobody outside sees: for accounts of memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BYTES = 4  # of a number in a field, whatever the storage


def workspace(operator: Any, arguments: Sequence[Any]) -> int:
    """Bytes that an operator of torch takes beyond its arguments and results; 0 where nothing is known of it."""
    name = operator.name()
    if name == "patchreg::integrate":
        return _integrate(*arguments)
    if name == "patchreg::integrate_backward":
        return _integrate_backward(*arguments)
    if name == "patchreg::warp_backward":
        return _warp_backward(*arguments)
    return 0


def _integrate(velocity: Tensor, steps: int, border: bool, stored: bool) -> int:
    if stored or steps < 2:
        return 0
    return _BYTES * velocity.numel() * (1 if velocity.dtype == torch.float32 else 2)


def _integrate_backward(upstream: Tensor, velocity: Tensor, fields: Tensor, steps: int, border: bool) -> int:
    if steps == 0:
        return 0
    stored = fields.ndim > 1
    taken = min(steps, 2) if stored else 1 + (steps - 1).bit_length()  # gradients, and fields made again
    given = 1 if velocity.dtype == torch.float32 else 0
    return _BYTES * velocity.numel() * (taken - given)


def _warp_backward(upstream: Tensor, image: Tensor | None, shape: Sequence[int], dtype: torch.dtype, *rest: Any) -> int:
    to_image = rest[-1][0]
    return _BYTES * torch.Size(shape).numel() if to_image and dtype != torch.float32 else 0
