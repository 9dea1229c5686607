"""One volume on many GPUs: slabs, halos, the sampler and the losses.

A volume is split along one of its dimensions over the ranks of a process group; each rank has a tensor of its own slab, and
a :class:`Partition` says who has what. Every function gives what one process would give for whole volumes, values and
gradients (:mod:`patchreg.distributed.shards` says what that means for what all ranks share). All ranks of the group must
call the same functions in the same order, the backward pass included: one that finds a mistake tells the others, and all
raise.

References:
    Jena et al. 2025 (FFDP), arXiv:2509.25044, sec. 3.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from patchreg.distributed.communication import Traffic, counting
from patchreg.distributed.halo import exchange_halo, start_halo
from patchreg.distributed.losses import bending_energy, diffusion, lncc, mse, mutual_information, soft_dice
from patchreg.distributed.partition import Partition, halo_widths
from patchreg.distributed.sampler import warp
from patchreg.distributed.shards import add_up, gather, repartition, scatter, share

if TYPE_CHECKING:
    from patchreg.distributed.strategy import GridParallelStrategy

__all__ = [
    "GridParallelStrategy",
    "Partition",
    "Traffic",
    "add_up",
    "bending_energy",
    "counting",
    "diffusion",
    "exchange_halo",
    "gather",
    "halo_widths",
    "lncc",
    "mse",
    "mutual_information",
    "repartition",
    "scatter",
    "share",
    "soft_dice",
    "start_halo",
    "warp",
]


def __getattr__(name: str) -> Any:
    """What needs Lightning is imported when it is asked for."""
    if name == "GridParallelStrategy":
        return import_module("patchreg.distributed.strategy").GridParallelStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "lightning.pytorch" in sys.modules:  # let its Trainer know the strategy by name
    import_module("patchreg.distributed.strategy")
