"""What a GPU does otherwise than a CPU, for tensors of the CPU that stand for those of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from patchreg.fake import Fakes
from patchreg.memory import MemoryLog
from patchreg.networks.checkpointing import offload_with
from patchreg.ops.dispatch import assume_kernels

HOST = "host"
"""The kind of what lies in host memory."""

FLOAT32_ON_GPU = (
    "layer_norm", "group_norm", "softmax.int", "log_softmax.int", "softplus", "exp", "expm1", "log", "log1p", "log2",
    "log10", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal", "rsqrt", "norm.Scalar", "norm.ScalarOpt_dim",
    "cosine_similarity", "cumsum", "cumprod",
)  # fmt: skip
"""Operators that autocast runs in float32 on a GPU and in half precision on a CPU."""

FLOAT32_ON_CPU = (
    "avg_pool3d", "max_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "reflection_pad1d", "reflection_pad2d",
)  # fmt: skip
"""The other way round."""


@contextmanager
def as_on_gpu(fakes: Fakes, log: MemoryLog) -> Iterator[None]:
    """Within the block autocast, the choice of kernels and what is offloaded are a GPU's.

    Args:
        fakes: makes what stands for a tensor that was moved.
        log: is told what lies in host memory.
    """

    def move(tensor: Tensor) -> Tensor:
        moved = fakes.empty(tensor.shape, tensor.dtype)
        log.label(HOST, moved)
        return moved

    def move_back(moved: Tensor) -> Tensor:
        return log.track(fakes.empty(moved.shape, moved.dtype))

    with assume_kernels(), _autocast(), offload_with(lambda: saved_tensors_hooks(move, move_back)):
        yield


@contextmanager
def _autocast() -> Iterator[None]:
    """Within the block autocast on the CPU has the lists of autocast on a GPU.

    References:
        https://docs.pytorch.org/docs/stable/amp.html, "Autocast Op Reference".
    """

    def rule(operator: Callable[..., Any], wide: bool) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if wide:
                args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return operator(*args, **kwargs)

        return run

    with torch.library._scoped_library("aten", "IMPL") as library:
        for names, wide in ((FLOAT32_ON_GPU, True), (FLOAT32_ON_CPU, False)):
            for name in names:
                base, _, overload = name.partition(".")
                operator = getattr(getattr(torch.ops.aten, base), overload or "default")
                library.impl(name, rule(operator, wide), "AutocastCPU")
        yield


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
