"""How much memory something takes."""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LivePeak(TorchDispatchMode):
    """The largest number of bytes that tensors made within the block hold at one time, on any device, without a GPU.

    Counts the storage of everything an operator returns until it is freed. Tensors that exist already do not count
    unless :meth:`track` is told of them. What operators allocate inside themselves is not seen.

    Attributes:
        live: bytes held now.
        peak: the largest ``live`` so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def track(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage from now until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)
        return tensor

    def _free(self, key: int) -> None:
        self.live -= self._seen.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.track, out)
        return out


class MemoryLog(LivePeak):
    """What lives when, so that the peak can be divided by kinds that are known only later.

    Args:
        inside: bytes that an operator with these arguments takes inside itself, beyond what it returns.

    Attributes:
        kind: of what is made now, unless :meth:`label` says another.
    """

    def __init__(self, inside: Callable[[Any, Any], int] | None = None, kind: str = "temporary") -> None:
        super().__init__()
        self.kind = kind
        self._inside = inside
        self._numbers: dict[int, int] = {}
        self._kinds: list[str] = []
        self._events: list[tuple[int, int]] = []
        self._start = 0

    def start(self) -> None:
        """Look for the peak from here on."""
        self._start = len(self._events)

    def track(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._seen:
            self._numbers[key] = self._log(tensor.untyped_storage().nbytes())
        return super().track(tensor)

    def label(self, kind: str, *tensors: Tensor) -> None:
        """Say what tensors are, from their beginning on; what they share memory with is the same."""
        for tensor in tensors:
            self._kinds[self._number(tensor)] = kind

    def suggest(self, kind: str, tensor: Tensor) -> None:
        """The same, where nothing has been said yet."""
        number = self._number(tensor)
        if self._kinds[number] == self.kind:
            self._kinds[number] = kind

    def at_peak(self, elsewhere: Collection[str] = ()) -> dict[str, int]:
        """Bytes of every kind at the moment when they were most in all.

        Args:
            elsewhere: kinds that do not count, because they lie on another device.
        """
        live: dict[str, int] = {}
        total = most = 0
        found: dict[str, int] = {}
        for place, (number, change) in enumerate(self._events):
            kind = self._kinds[number]
            if kind in elsewhere:
                continue
            live[kind] = live.get(kind, 0) + change
            total += change
            if place >= self._start and total > most:
                most, found = total, dict(live)
        return {kind: size for kind, size in found.items() if size}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self._inside is not None and (taken := self._inside(func, args)):
            self._events.append((self._log(taken), -taken))
        return out

    def _free(self, key: int) -> None:
        self._events.append((self._numbers.pop(key), -self._seen[key]))
        super()._free(key)

    def _log(self, size: int) -> int:
        self._kinds.append(self.kind)
        self._events.append((len(self._kinds) - 1, size))
        return len(self._kinds) - 1

    def _number(self, tensor: Tensor) -> int:
        self.track(tensor)
        return self._numbers[tensor.untyped_storage()._cdata]


def peak_mib(device: torch.device) -> dict[str, float]:
    """The process's peak so far in MiB: resident on the host and, on a GPU, what torch allocated at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if device.type == "cuda":
        found["device"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return found
