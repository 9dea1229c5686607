"""Which share of the data this process draws."""

from __future__ import annotations

import torch


class _Told:
    rank: int | None = None


def data_rank() -> int:
    """The number that tells what this process draws at random from what others draw: its rank, unless it was told another.

    Processes that share one volume must draw the same pair, and are told the same number.
    """
    if _Told.rank is not None:
        return _Told.rank
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def draw_as(rank: int | None) -> None:
    """Tell this process, and those that it forks to load data, what :func:`data_rank` is. None: its rank again."""
    _Told.rank = rank
