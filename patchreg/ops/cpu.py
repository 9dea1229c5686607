"""The compiled CPU extension: whether it is here, and how tensors are handed to it."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

STORAGE: dict[torch.dtype, int] = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The dtypes that kernels read and write, and their codes in ``csrc/common/storage.h``."""


@cache
def find_extension() -> ModuleType | None:
    """``patchreg._cpu``, or None where the package was installed without a compiler."""
    try:
        return importlib.import_module("patchreg._cpu")
    except ImportError:
        return None


def extension() -> ModuleType:
    """``patchreg._cpu``.

    Raises:
        RuntimeError: it was not built; the dispatch asks :func:`find_extension` first.
    """
    found = find_extension()
    if found is None:
        raise RuntimeError("patchreg was installed without its compiled CPU kernels")
    return found


def address(tensor: Tensor | None) -> int:
    """Where the data of a contiguous tensor begins; 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def threads() -> int:
    """As many as torch uses for its own operations."""
    return torch.get_num_threads()
