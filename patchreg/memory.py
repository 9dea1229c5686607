"""How much memory something takes."""

from __future__ import annotations

import resource
import sys
import weakref
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


def peak_mib(device: torch.device) -> dict[str, float]:
    """The process's peak so far in MiB: resident on the host and, on a GPU, what torch allocated at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if device.type == "cuda":
        found["device"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return found
