"""A command run by several processes that share the work: started here, or by torchrun or SLURM."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from patchreg.cli.main import set_up_logging
from patchreg.distributed.failures import broken
from patchreg.errors import InputError, PatchregError, RankLost

HOLD = 5.0
"""Seconds that a process other than the first waits before it says what went wrong: the first says it at once, and then
whoever started them ends the others. What many find out alike is said once."""

Work = Callable[[dist.ProcessGroup, Any], None]
"""Called with the group of all processes and the options of a command."""


@dataclass(frozen=True)
class Place:
    """Of this process among all.

    Args:
        rank: its number.
        size: how many there are.
        local_rank: its number on its machine.
        method: how they find each other, as ``torch.distributed.init_process_group`` takes it.
    """

    rank: int
    size: int
    local_rank: int
    method: str


def find_place() -> Place | None:
    """Where torchrun, or srun with several tasks, has started this process. None: neither has."""
    given = os.environ
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(given):
        return Place(int(given["RANK"]), int(given["WORLD_SIZE"]), int(given["LOCAL_RANK"]), "env://")
    tasks = int(given.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1 and "SLURM_PROCID" in given:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        node = SLURMEnvironment.resolve_root_node_address(given.get("SLURM_STEP_NODELIST", given["SLURM_NODELIST"]))
        port = 15000 + (int(given["SLURM_JOB_ID"]) + 101 * int(given.get("SLURM_STEP_ID", 0))) % 10000
        return Place(int(given["SLURM_PROCID"]), tasks, int(given["SLURM_LOCALID"]), f"tcp://{node}:{port}")
    return None


def check_devices(devices: int | None, device: str, place: Place | None) -> int:
    """How many processes share the work.

    Args:
        devices: as asked for; None: as many as there are already.
        device: what each is to compute on.
        place: of this process, if others have started it.

    Raises:
        InputError: what cannot be had.
    """
    if devices is not None and devices < 1:
        raise InputError(f"--devices must be at least 1, got {devices}")
    if place is not None and devices not in (None, place.size):
        raise InputError(
            f"--devices {devices} was asked for, but this is one of {place.size} processes that were started together: "
            "leave it out"
        )
    count = place.size if place is not None else devices or 1
    if count > 1 and ":" in device:
        raise InputError(f"--device {device} names one device, but {count} were asked for: give --device cuda or cpu")
    if count > 1 and place is None and _on_gpus(device) and count > torch.cuda.device_count():
        raise InputError(
            f"--devices {count} was asked for, but torch sees {torch.cuda.device_count()} GPUs here: ask for as many, or "
            "give --device cpu"
        )
    return count


def run_at(place: Place, work: Work, options: Any) -> None:
    """Be one of the processes that others have started; where it fails, this process ends."""
    status = _run(place, work, options, lambda text: print(f"patchreg: {text}", file=sys.stderr))
    if status:
        _end(status)


def start(count: int, work: Work, options: Any) -> None:
    """Start processes for some work on this machine, and wait for them; when one fails, all are ended.

    Raises:
        PatchregError: what the first that failed has found wrong.
        RankLost: it crashed, or was killed.
    """
    logging.getLogger(start_processes.__module__).setLevel(logging.ERROR)  # it tells whom it ends
    with tempfile.TemporaryDirectory(prefix="patchreg") as folder:
        try:
            start_processes(_process, (count, folder, work, options), count, start_method="spawn")
        except (ProcessExitedException, ProcessRaisedException) as error:
            raise _reason(error, count, Path(folder)) from None


def _process(rank: int, count: int, folder: str, work: Work, options: Any) -> None:
    """What a process does that was started here."""
    set_up_logging(logging.DEBUG if options.verbose else logging.WARNING)
    if not _on_gpus(options.device):
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    said: list[str] = []
    status = _run(Place(rank, count, rank, f"file://{folder}/store"), work, options, said.append)
    if status:
        unfinished = Path(folder, f"{rank}.unfinished")
        unfinished.write_text(json.dumps([status, *said]))
        unfinished.rename(Path(folder, f"{rank}.reason"))
        _end(status)


def _run(place: Place, work: Work, options: Any, say: Callable[[str], None]) -> int:
    """Connect and work; 0, or the exit status after the reason was said."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was begun is cleaned up
    try:
        work(_connect(place, options.device), options)
        dist.barrier()
        dist.destroy_process_group()
        return 0
    except PatchregError as error:
        _hold(place)
        if options.verbose:
            logging.getLogger("patchreg").exception("where it happened")
        say(" ".join(str(error).split()))
        return 2
    except Exception as error:
        lost = broken(error)  # another has ended, and will have said why
        _hold(place, lost)
        if options.verbose or not lost:
            traceback.print_exc()
        what = "lost another" if lost else "failed"
        say(f"process {place.rank} of {place.size} {what} ({type(error).__name__}: {' '.join(str(error).split())})")
        return 1


def _hold(place: Place, lost: bool = False) -> None:
    if place.rank > 0 or lost:
        time.sleep(HOLD)


def _connect(place: Place, device: str) -> dist.ProcessGroup:
    """The group of all processes, each with a GPU of its own where there are some."""
    if place.rank > 0:
        set_up_logging(logging.ERROR)
    backend = "gloo"
    if _on_gpus(device):
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(
            place.local_rank % max(1, torch.cuda.device_count())
        )  # a task of SLURM may see its own alone
    dist.init_process_group(backend, init_method=place.method, rank=place.rank, world_size=place.size)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _on_gpus(device: str) -> bool:
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _end(status: int) -> None:
    """End this process at once: it may have threads that wait for others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _reason(error: ProcessExitedException | ProcessRaisedException, count: int, folder: Path) -> PatchregError:
    """What was wrong, from what the processes have left behind."""
    code = getattr(error, "exit_code", 1)
    if code < 0:
        name = signal.Signals(-code).name
        memory = "; perhaps there was not enough memory" if name == "SIGKILL" else ""
        return RankLost(f"process {error.error_index} of {count} was ended by {name}{memory}; nothing was written")
    reasons = sorted(folder.glob("*.reason"), key=lambda path: path.stat().st_mtime_ns)
    if not reasons:
        return RankLost(f"process {error.error_index} of {count} failed: {error}")
    status, said = json.loads(reasons[0].read_text())
    return PatchregError(said) if status == 2 else RankLost(f"{said}; nothing was written")
