"""How much memory a run took."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """Peak so far in MiB: resident on the host and, on a GPU, what torch allocated at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)}
    if device.type == "cuda":
        found["device"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return found
