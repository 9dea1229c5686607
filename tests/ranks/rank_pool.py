"""Processes that stay for a whole test session and run functions of the test files as the ranks of a group."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

GROUPS = {1: (0,), 2: (2, 3), 3: (1, 2, 3), 4: (0, 1, 2, 3)}
"""The processes that make up a group of so many ranks: not the first ones, so that nobody may mistake one for the other."""


class RankError(AssertionError):
    """A rank raised, died or hung."""


class RankPool:
    """Starts on first use; after a failure that leaves ranks behind it starts anew.

    Args:
        groups: the processes of groups of each size.
        grace: seconds that other ranks get after one has raised.
    """

    def __init__(self, groups: Mapping[int, tuple[int, ...]] = GROUPS, grace: float = 5.0) -> None:
        self.groups, self.grace = dict(groups), grace
        self.processes = 1 + max(member for members in groups.values() for member in members)
        self._workers: list[tuple[Any, Any]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, ranks: int, program: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """What ``program(group, *args)`` returns on every rank of a group.

        Args:
            ranks: how many.
            program: a function at the top of a file; every rank loads the file.
            args: anything that can be pickled.
            timeout: seconds until the ranks count as hanging.

        Raises:
            RankError: with each rank's traceback, or where it hangs.
        """
        members = list(self.groups[ranks])
        if not self._workers:
            self._start()
        request = (ranks, program.__code__.co_filename, program.__qualname__, args)
        for member in members:
            self._workers[member][1].send_bytes(pickle.dumps(request))
        answers = self._collect(members, time.monotonic() + timeout)
        bad = {rank: text for rank, (good, text) in answers.items() if not good}
        if bad or len(answers) < len(members):
            hanging = [rank for rank in members if rank not in answers]
            message = self._report(members, bad, hanging)
            if hanging:
                self.stop()
            raise RankError(message)
        return [answers[member][1] for member in members]

    def stop(self) -> None:
        """End all processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        context = multiprocessing.get_context("spawn")
        for rank in range(self.processes):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.processes, self.groups, self._folder.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, mine))
        everyone = list(range(self.processes))
        answers = self._collect(everyone, time.monotonic() + 120)
        bad = {rank: text for rank, (good, text) in answers.items() if not good}
        if bad or len(answers) < self.processes:
            message = self._report(everyone, bad, [rank for rank in everyone if rank not in answers])
            self.stop()
            raise RankError(f"the processes did not start\n{message}")

    def _collect(self, members: list[int], deadline: float) -> dict[int, tuple[bool, Any]]:
        """The answers that come in time."""
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < len(members) and time.monotonic() < deadline:
            waiting = [m for m in members if m not in answers]
            pipes = {self._workers[m][1]: m for m in waiting}
            for pipe in multiprocessing.connection.wait(list(pipes), timeout=0.2):
                member = pipes[pipe]
                try:
                    answers[member] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    code = self._workers[member][0].exitcode
                    answers[member] = (False, f"the process died (exit status {code})")
                if not answers[member][0]:
                    deadline = min(deadline, time.monotonic() + self.grace)
        return answers

    def _report(self, members: list[int], bad: dict[int, str], hanging: list[int]) -> str:
        lines = [f"rank {members.index(m)} (process {m}) raised:\n{text}" for m, text in bad.items()]
        for member in hanging:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._workers[member][0].pid, signal.SIGUSR1)
        time.sleep(0.5 if hanging else 0)
        for member in hanging:
            stack = Path(self._folder.name, f"stack{member}").read_text() or "no stack"
            lines.append(f"rank {members.index(member)} (process {member}) hangs:\n{stack}")
        return "\n".join(lines)


def _serve(rank: int, processes: int, groups: dict[int, tuple[int, ...]], folder: str, pipe: Any) -> None:
    """A process: connect, then run what comes until the pipe closes."""
    with open(Path(folder, f"stack{rank}"), "w") as stacks:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
        connected = {size: dist.new_group(list(members)) for size, members in groups.items()}
        pipe.send_bytes(pickle.dumps((True, None)))
        while True:
            try:
                size, path, name, args = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError):
                return
            try:
                answer = (True, _load(path, name)(connected[size], *args))
            except Exception:
                answer = (False, traceback.format_exc())
            pipe.send_bytes(pickle.dumps(answer))


_modules: dict[str, Any] = {}


def _load(path: str, name: str) -> Callable[..., Any]:
    """A function of a file, which is run once."""
    if path not in _modules:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        assert spec is not None
        assert spec.loader is not None
        _modules[path] = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(_modules[path])
    return getattr(_modules[path], name)
