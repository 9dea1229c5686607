"""What a part of a network ran under, so that it can run again just so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from patchreg.errors import NoGradient
from patchreg.networks.surroundings import surrounded, surroundings


@dataclass(frozen=True)
class Precision:
    """Types of numbers in a part of a network, such as a reversible sequence, and what surrounded it.

    Attributes:
        device_type: of the tensors.
        autocast: its type, or None where it is off.
        stream: of the two streams: at least float32, or rounding would grow from block to block.
        inner: of what the layers are given.
        output: of the sequence.
        around: see :mod:`patchreg.networks.surroundings`.
    """

    device_type: str
    autocast: torch.dtype | None
    stream: torch.dtype
    inner: torch.dtype
    output: torch.dtype
    around: object | None = field(default_factory=surroundings)

    @classmethod
    def now(cls, x: Tensor) -> Precision:
        """For this input, under the autocast that is on."""
        device_type = x.device.type
        stream = torch.promote_types(x.dtype, torch.float32)
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            return cls(device_type, torch.get_autocast_dtype(device_type), stream, stream, stream)
        return cls(device_type, None, stream, x.dtype, x.dtype)

    def again(self) -> AbstractContextManager[object]:
        """Autocast and surroundings as they were. A weight cast without a gradient must not be found again where it needs
        one."""
        autocast: AbstractContextManager[object] = nullcontext()
        if torch.amp.is_autocast_available(self.device_type):
            autocast = torch.autocast(self.device_type, self.autocast, self.autocast is not None, cache_enabled=False)
        if self.around is None:
            return autocast
        both = ExitStack()
        both.enter_context(autocast)
        both.enter_context(surrounded(self.around))
        return both


@dataclass(frozen=True)
class Randomness:
    """The states of the random number generators of the host and of a tensor's device."""

    host: Tensor
    device_type: str
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, x: Tensor) -> Randomness:
        """Before ``x`` is used."""
        device_type = x.device.type
        devices: list[int] = []
        states: list[Tensor] = []
        if device_type not in ("cpu", "meta") and torch.get_device_module(device_type).is_initialized():
            devices, states = get_device_states(x)  # not where the tensors are fakes of a device that is not there
        return cls(torch.get_rng_state(), device_type, devices, states)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within the block random numbers come as they came then; outside nothing changes."""
        device_type = self.device_type if self.devices else "cuda"
        with torch.random.fork_rng(self.devices, device_type=device_type):
            torch.set_rng_state(self.host)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=device_type)
            yield


def check_backward(what: str, parameters: Sequence[Tensor], versions: Sequence[int]) -> None:
    """Refuse a backward pass that would run something again, and find another thing.

    Args:
        what: runs again, for the message.
        parameters: that it uses.
        versions: of the parameters, when it ran first.

    Raises:
        NoGradient: a second derivative is asked for, or the parameters have changed.
    """
    if torch.is_grad_enabled():
        raise NoGradient(f"{what} has no second derivative: call backward without create_graph, or set memory: stored")
    if [p._version for p in parameters] != list(versions):
        raise NoGradient(
            f"the parameters of {what} changed between its forward and its backward pass, so that it cannot run again as "
            "it ran: call backward before the optimiser's step"
        )
