"""Gradients of which every rank of a grid has a part, added up while the backward pass still runs.

Without the annotations of the future: torch looks at those of a hook.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future

Hook: TypeAlias = Callable[[object, GradBucket], Future[Tensor]]
"""A communication hook of ``DistributedDataParallel``: the mean of a bucket of gradients over all ranks."""


def mean_of_sums(grid: int, hook: Hook | None = None) -> Hook:
    """A communication hook that adds gradients up over the ranks of a grid, and takes the mean over the grids.

    Every rank of a grid has a part of the gradient of each parameter; other grids have other data. With R ranks in G grids
    the gradient is ``sum(parts) / G``, which is R / G times the mean that data parallelism takes.

    Args:
        grid: ranks of a grid, R / G.
        hook: one that gives the mean over all ranks, perhaps compressed, and is given its own state. None: a plain sum.
    """

    def add_up(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        part = bucket.buffer().div_(dist.get_world_size() // grid)
        work = dist.all_reduce(part, async_op=True)
        assert work is not None
        return work.get_future().then(_first)

    def scale_up(state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        assert hook is not None
        return hook(state, bucket).then(lambda mean: _first(mean).mul_(grid))

    return add_up if hook is None else scale_up


def _first(done: Future[Tensor]) -> Tensor:
    value = done.value()
    return value if isinstance(value, Tensor) else value[0]
