"""What a network keeps of its activations for the backward pass, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from patchreg.errors import InputError
from patchreg.networks.surroundings import surrounded, surroundings
from patchreg.types import Activations

Result = TypeVar("Result")

POLICIES: tuple[Activations, ...] = ("stored", "checkpoint", "reversible")


def check_policy(memory: str, reversible: bool, name: str) -> None:
    """Refuse a policy that does not exist, or that a network cannot follow.

    Args:
        memory: the policy.
        reversible: whether the network has reversible blocks.
        name: of the network, for the message.

    Raises:
        InputError: see above.
    """
    if memory not in POLICIES:
        raise InputError(f"memory must be one of {', '.join(POLICIES)}, got {memory!r}")
    if memory == "reversible" and not reversible:
        raise InputError(
            f"{name} has no reversible blocks, so memory: reversible cannot be: set its option reversible (another "
            "network, to be trained from the start), or memory: checkpoint (the same network)"
        )


def run_part(memory: Activations, part: Callable[..., Result], *inputs: Tensor) -> Result:
    """Run a part of a network; unless everything is stored, only its inputs are kept, and it runs again in backward.

    Random numbers are drawn again as they were, autocast and the surroundings are as they were. Values and gradients are those of the plain
    call.

    Args:
        memory: the policy; ``"reversible"`` does for a part that is not reversible what ``"checkpoint"`` does.
        part: called with the inputs.
        inputs: all tensors that need a gradient, parameters excepted.

    References:
        Chen et al. 2016, arXiv:1604.06174.
    """
    if memory == "stored" or not torch.is_grad_enabled():
        return part(*inputs)
    if surroundings() is not None:
        part = partial(_surrounded, surroundings(), part)
    result: Result = checkpoint(part, *inputs, use_reentrant=False)
    return result


def _surrounded(by: object, part: Callable[..., Result], *inputs: Tensor) -> Result:
    with surrounded(by):
        return part(*inputs)


def offloading(offload: bool, device: torch.device) -> AbstractContextManager[object]:
    """Within the block, what is kept for the backward pass goes to host memory, pinned where that helps.

    Costs host memory and transfers; on the CPU it changes nothing.
    """
    if not offload or not torch.is_grad_enabled():
        return nullcontext()
    if (hooks := _instead.get()) is not None:
        return hooks()
    return nullcontext() if device.type == "cpu" else save_on_cpu(pin_memory=device.type == "cuda")


Hooks = Callable[[], AbstractContextManager[object]]
_instead: ContextVar[Hooks | None] = ContextVar("instead", default=None)


@contextmanager
def offload_with(hooks: Hooks) -> Iterator[None]:
    """Within the block :func:`offloading` does what ``hooks`` make, on any device: to account for another machine."""
    token = _instead.set(hooks)
    try:
        yield
    finally:
        _instead.reset(token)
