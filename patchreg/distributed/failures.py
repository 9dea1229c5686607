"""What a process of a training does when it, or another, fails."""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from patchreg.distributed.lifeline import Lifeline, News
from patchreg.errors import RankLost

GRACE = 15.0
"""Seconds in which a process may end by itself, after it was told that another has failed."""

PATIENCE = 5.0
"""Seconds that a process whose communication broke waits for news of why it did."""


@dataclass(frozen=True)
class Training:
    """What a message is made of.

    Args:
        rank: of this process.
        world: how many processes there are.
        grid: ranks that share a volume.
        timeout: seconds after which communication gives up.
    """

    rank: int
    world: int
    grid: int
    timeout: float


class Guard:
    """Ends this process with a reason when another of its training fails, and tells the others when it fails itself.

    A process that is told has :data:`GRACE` seconds: one that waits for messages of a process that is gone will end with
    an error of its own, which :meth:`explain` turns into the reason; one that does not, as with NCCL, is ended here.

    Args:
        training: see there.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.has_failed = False
        self._trainer: Any = None
        self._lifeline: Lifeline | None = None
        self._over = threading.Event()

    def connect(self, broadcast: Callable[[Any], Any], address: str, trainer: Any) -> None:
        """Connect all processes; they must all call this.

        Args:
            broadcast: gives all what rank 0 says.
            address: of rank 0.
            trainer: the one that knows the checkpoints.
        """
        self._over, self._trainer = threading.Event(), trainer
        if self.training.world == 1:
            return
        if self.training.rank == 0:
            self._lifeline, port, token = Lifeline.host(self._end)
            broadcast((address, port, token))
        else:
            address, port, token = broadcast(None)
            self._lifeline = Lifeline.join(address, port, token, self.training.rank, self._end)

    def close(self) -> None:
        """The training is over: what happens now concerns nobody else."""
        self._over.set()
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None

    def explain(self, error: BaseException) -> Exception | None:
        """Called when this process has raised: tell the others, or find out what happened to them.

        Returns:
            What to raise instead; None: the error is this process's own.
        """
        self.has_failed = True
        kind, text = type(error).__name__, " ".join(str(error).split())
        if not broken(error):
            if self._lifeline is not None:
                self._lifeline.tell(
                    f"raised {kind}: {text}" if isinstance(error, Exception) else f"was stopped ({kind})"
                )
            return None
        within = f"within {self.training.timeout:g} s"
        if not dist.is_initialized():
            return RankLost(f"not all of the {self.training.world} processes came {within} ({kind}: {text})")
        news = None if self._lifeline is None else self._lifeline.wait(PATIENCE)
        if news is None or news.rank == self.training.rank:
            news = News(self.training.rank, f"got no answer from another rank {within}, or lost it ({kind}: {text})")
            if self._lifeline is not None:
                self._lifeline.tell(news.what)
        return RankLost(self._told(news))

    def _end(self, news: News) -> None:
        """End this process, unless it ends by itself: it may be waiting for one that is gone, or be the one that hangs."""
        if self._over.wait(GRACE):
            return
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        where = "".join(traceback.format_stack(frame)) if frame else ""
        sys.stderr.write(f"{where}patchreg: {self._told(news)}; rank {self.training.rank} was there\n")
        sys.stderr.flush()
        os._exit(1)

    def _told(self, news: News) -> str:
        """One message of what happened, and how to go on."""
        size = self.training.grid
        first = news.rank // size * size
        grid = f" of the grid group of ranks {first} to {first + size - 1}" if size > 1 else ""
        saved = last_checkpoint(self._trainer)
        go_on = (
            f"the last checkpoint is {saved}: resume with --ckpt_path {saved}"
            if saved
            else "no checkpoint was saved yet"
        )
        return f"rank {news.rank}{grid} {news.what}; {go_on}"


def last_checkpoint(trainer: Any) -> Path | None:
    """The newest checkpoint file of a run, or the one that it was resumed from."""
    if trainer is None:
        return None
    names: set[str] = set()
    for callback in trainer.checkpoint_callbacks:
        names |= {getattr(callback, "last_model_path", ""), getattr(callback, "best_model_path", "")}
        names |= set(getattr(callback, "best_k_models", {}))
    files = [Path(name) for name in names if name and Path(name).exists()]
    if files:
        return max(files, key=lambda path: path.stat().st_mtime)
    return Path(trainer.ckpt_path) if trainer.ckpt_path else None


_BROKEN = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|timed out waiting|broken pipe|TCPStore", re.IGNORECASE
)


def broken(error: BaseException) -> bool:
    """Whether an error says that communication broke, and not why."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and bool(_BROKEN.search(str(error)))
