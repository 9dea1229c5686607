"""The processes that register one pair of images together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from patchreg import errors
from patchreg.distributed.communication import Group, process_group
from patchreg.errors import InputError, PatchregError, RankLost
from patchreg.io import staged_folder

T = TypeVar("T")


class Ranks:
    """One process, or several that share the images.

    All must call the same methods, in the same order.

    Args:
        group: a process group, or a mesh of one axis. None: this process alone, and nothing is sent.

    Raises:
        InputError: the group cannot send what lies on the host.
    """

    def __init__(self, group: Group = None) -> None:
        self.group: dist.ProcessGroup | None = None
        if group is None:
            return
        self.group = process_group(group)
        if "cpu:" not in dist.get_backend_config(self.group):
            raise InputError(
                "images and fields may lie on the host, where this group sends nothing: "
                "init_process_group('cpu:gloo,cuda:nccl')"
            )

    @property
    def count(self) -> int:
        """How many processes there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's number."""
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def first(self) -> bool:
        """Whether this process is the one that speaks for all."""
        return self.rank == 0

    def all_of(self, value: T) -> list[T]:
        """The value of every process, which must be small and picklable."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self.group)
        return found

    def from_first(self, value: T) -> T:
        """The value of the first process."""
        if self.group is None:
            return value
        found: list[Any] = [value]
        dist.broadcast_object_list(found, group=self.group, group_src=0)
        return found[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that all processes leave well, or that fails in all with the error of the first that failed.

        Within, nothing may wait for another process.

        Raises:
            RankLost: another process failed by what is no error of patchreg.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        told = None if own is None else (type(own).__name__, " ".join(str(own).split()))
        failed = [(rank, *what) for rank, what in enumerate(self.all_of(told)) if what is not None]
        if failed:
            self._raise(*failed[0], own)

    @contextmanager
    def folder(self, target: Path) -> Iterator[Path]:
        """:func:`patchreg.io.staged_folder` for all processes: the first makes it, and moves it when all are done."""
        with ExitStack() as stack:
            place: Path | None = None
            with self.together():
                if self.first:
                    place = stack.enter_context(staged_folder(target))
            yield self.from_first(place)  # type: ignore[misc]
            with self.together():
                stack.close()

    def _raise(self, rank: int, name: str, text: str, own: Exception | None) -> None:
        """Raise what a rank has raised, where ``own`` is what this one has."""
        if rank == self.rank and own is not None:
            raise own
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, PatchregError):
            raise kind(text) from own
        raise RankLost(f"rank {rank} raised {name}: {text}") from own
