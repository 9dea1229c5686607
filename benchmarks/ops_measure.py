"""Seconds, memory and bandwidth, on the CPU and on a GPU."""

from __future__ import annotations

import ctypes
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SLOW_SECONDS = 5.0
"""What takes longer is run once."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of several runs, and the memory of the first."""

    runs: list[float]
    extra_bytes: int | None

    @property
    def median(self) -> float:
        """Of the runs, in milliseconds."""
        return statistics.median(self.runs)


def measure(call: Callable[[], object], device: torch.device, repeats: int) -> Timing:
    """Run ``call`` once for its memory, then for its time; what is slow only once for both."""
    start = time.perf_counter()
    extra = peak_extra_bytes(call, device)
    first = time.perf_counter() - start
    if first > SLOW_SECONDS:
        return Timing([1e3 * first], extra)
    call()
    synchronize(device)
    runs = on_gpu(call, repeats) if device.type == "cuda" else on_cpu(call, repeats)
    return Timing(runs, extra)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_cpu(call: Callable[[], object], repeats: int) -> list[float]:
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        runs.append(1e3 * (time.perf_counter() - start))
    return runs


def on_gpu(call: Callable[[], object], repeats: int) -> list[float]:
    """Between events on the stream, with the launches of one run behind those of the last, as in a loop of training."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that a run holds beyond what there was before, results included; None where it cannot be read."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not reset_peak():
        call()
        return None
    before = resident_bytes("VmRSS")
    call()
    return max(0, resident_bytes("VmHWM") - before)


def reset_peak() -> bool:
    """Give freed memory back to the system and forget the peak so far; False where this is not Linux."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def resident_bytes(name: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (at most) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def available_bytes(device: torch.device) -> float:
    """Memory that may still be taken."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    file = Path("/proc/meminfo")
    if not file.is_file():
        return float("inf")
    return 1024.0 * next(int(line.split()[1]) for line in file.read_text().splitlines() if "MemAvailable" in line)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds: the best of several."""
    size = 1 << (29 if device.type == "cuda" else 26)
    source = torch.ones(size, device=device)
    target = torch.zeros_like(source)

    def call() -> None:
        target.copy_(source)

    call()
    synchronize(device)
    runs = on_gpu(call, 10) if device.type == "cuda" else on_cpu(call, 10)
    return 2 * source.nbytes / (1e-3 * min(runs))
