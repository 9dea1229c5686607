"""Which implementation of an operation runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import get_args

import torch
from torch import Tensor

from patchreg.errors import BackendUnavailable, InputError
from patchreg.ops import cpu
from patchreg.ops.cuda import launch
from patchreg.types import Backend

_log = logging.getLogger(__name__)

_assumed: ContextVar[bool] = ContextVar("assumed", default=False)


@contextmanager
def assume_kernels() -> Iterator[None]:
    """Within the block every kernel counts as one that can run: for fake tensors, on behalf of another machine."""
    token = _assumed.set(True)
    try:
        yield
    finally:
        _assumed.reset(token)


def is_native(name: str, backend: Backend, *tensors: Tensor | None) -> bool:
    """Whether operation ``name`` runs on its native kernel.

    Args:
        name: the operation, for the message.
        backend: ``"auto"`` takes the native kernel where it can run; ``"native"`` never falls back in silence.
        tensors: the floating tensors that the kernel would read; None is passed over.

    Raises:
        BackendUnavailable: ``"native"`` was asked for and no kernel takes these tensors here.
        InputError: no such backend.
    """
    if backend not in get_args(Backend):
        raise InputError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if backend == "reference":
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    reason = why_not_native(device.type, device.index, tuple(tensor.dtype for tensor in given))
    if reason is not None and backend == "native":
        raise BackendUnavailable(f"{name} cannot run on its native kernel: {reason}")
    return reason is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not_native(kind: str, index: int | None, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why no native kernel takes tensors of these dtypes on device ``kind:index``, or None where one does."""
    for dtype in dtypes:
        if dtype not in cpu.STORAGE:
            return f"kernels store float32, float16 or bfloat16, not {dtype}: use backend='auto' or 'reference'"
    if _assumed.get():
        return None
    if kind == "cuda" or launch.emulated():
        return launch.why_not(torch.device(kind) if index is None else torch.device(kind, index))
    if kind != "cpu":
        return f"there are kernels for cpu and cuda, not for {kind}: use backend='auto' or 'reference'"
    if cpu.find_extension() is None:
        _tell_what_is_lost()
        return _NO_EXTENSION
    return None


_NO_EXTENSION = (
    "this installation has no compiled CPU kernels: install a C++17 compiler (g++ or clang) and then patchreg again, "
    "or use backend='auto' or 'reference'"
)


@cache
def _tell_what_is_lost() -> None:
    """Once in a process: pip hides what the build said."""
    _log.warning(
        "patchreg was installed without its compiled CPU kernels, because they could not be built: similarity, warping and "
        "composition run on plain PyTorch on the CPU, 5 to 100 times slower and with more memory. To get them, install a "
        "C++17 compiler (g++ or clang) and then patchreg again."
    )
