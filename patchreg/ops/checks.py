"""Checks at the public boundary of the operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from patchreg.errors import InputError


def volume(name: str, tensor: Tensor, channels: int | None = None) -> None:
    """Raise unless ``tensor`` is a floating (B, C, I, J, K) volume, with ``channels`` channels where given."""
    wanted = f"(B, {channels if channels else 'C'}, I, J, K)"
    if tensor.ndim != 5 or (channels is not None and tensor.shape[1] != channels):
        hint = (
            ": move the components to dim 1" if channels and tensor.ndim == 5 and tensor.shape[-1] == channels else ""
        )
        raise InputError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}{hint}")
    if min(tensor.shape) == 0:
        raise InputError(f"{name} is empty: shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise InputError(f"{name} must be a floating tensor, got {tensor.dtype}: convert it with .float()")


def same_shape(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raise unless both tensors have one shape and one device."""
    if a.shape != b.shape:
        raise InputError(f"{first} and {second} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    same_device(first, a, second, b)


def same_device(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if a.device != b.device:
        raise InputError(f"{first} is on {a.device} and {second} on {b.device}: move one of them")


def broadcast_mask(name: str, mask: Tensor, like: Tensor, weights: bool = False) -> Tensor:
    """``mask`` as a (B, 1, I, J, K) tensor of the dtype and device of ``like``.

    Its content is only looked at where it can be: not while a graph is traced or captured. What an empty mask means
    there is up to the operation.

    Args:
        name: for messages.
        mask: (B, 1, I, J, K) or (1, 1, I, J, K).
        like: (B, C, I, J, K).
        weights: whether negative values are refused.

    Raises:
        InputError: the mask does not broadcast to ``like``, is empty, or negative where it must not be.
    """
    wanted = (like.shape[0], 1, *like.shape[2:])
    if (
        mask.ndim != 5
        or mask.shape[1] != 1
        or mask.shape[2:] != like.shape[2:]
        or mask.shape[0] not in (1, like.shape[0])
    ):
        raise InputError(f"{name} must have shape {wanted}, got {tuple(mask.shape)}")
    mask = mask.to(like.device, like.dtype if like.is_floating_point() else torch.float32)
    if has_content(mask):
        low, high = mask.detach().flatten(1).aminmax(dim=1)
        if not bool((high > 0).all()):
            raise InputError(f"{name} is empty: no voxel is selected")
        if weights and bool((low < 0).any()):
            raise InputError(f"{name} must not be negative, got {float(low.min()):g}")
    return mask.expand(wanted)


def has_content(tensor: Tensor) -> bool:
    """Whether Python may look at the numbers in ``tensor``: not when a graph is traced, or captured by CUDA."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    if not tensor.is_cuda:
        return True
    with torch.cuda.device(tensor.device):
        return not torch.cuda.is_current_stream_capturing()
