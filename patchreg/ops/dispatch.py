"""Which implementation of an operation runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, get_args

from patchreg.errors import BackendUnavailable, InputError
from patchreg.types import Backend

Function = TypeVar("Function", bound=Callable[..., object])


def choose(name: str, backend: Backend, reference: Function, native: Function | None) -> Function:
    """The implementation of operation ``name`` that ``backend`` asks for.

    Args:
        name: the operation, for the message.
        backend: ``"auto"`` takes the native kernel where there is one; ``"native"`` never falls back in silence.
        reference: the PyTorch implementation.
        native: the kernel, or None where none is built for this operation.

    Raises:
        BackendUnavailable: ``"native"`` was asked for and there is no kernel.
        InputError: no such backend.
    """
    if backend not in get_args(Backend):
        raise InputError(f"backend must be one of {get_args(Backend)}, got {backend!r}")
    if backend == "native" and native is None:
        raise BackendUnavailable(f"{name} has no native kernel in this installation: use backend='auto' or 'reference'")
    return reference if backend == "reference" or native is None else native
