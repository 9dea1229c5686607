"""Programs that need nothing but torch."""

from __future__ import annotations

import time

import torch.distributed as dist


def nothing(group):
    """What a healthy rank does."""


def stray(group):
    """One rank waits for another that never comes."""
    if dist.get_rank(group) == 0:
        dist.barrier(group)
    else:
        time.sleep(600)
