"""Slabs beside whole volumes."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from patchreg.distributed import Partition

SHARES = {
    2: [(0.5, 0.5), (0.75, 0.25)],
    3: [(1 / 3, 1 / 3, 1 / 3), (0.2, 0.5, 0.3)],
    4: [(0.25, 0.25, 0.25, 0.25), (0.4, 0.1, 0.0, 0.5)],
}
"""Parts of a volume that ranks hold: even and uneven, one of them empty."""

CASES = [(ranks, shares) for ranks, each in SHARES.items() for shares in each]


def split(total: int, shares: tuple[float, ...], dim: int = 2) -> Partition:
    """A partition by shares of a volume."""
    cuts = [round(total * sum(shares[:n])) for n in range(len(shares))] + [total]
    return Partition(tuple(b - a for a, b in itertools.pairwise(cuts)), dim)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative L2 error; 0 for two empty ones."""
    if found.shape != expected.shape:
        raise AssertionError(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    a, b = found.detach().double(), expected.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30)) if a.numel() and float((a - b).norm()) else 0.0


def slab(whole: Tensor, partition: Partition, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of a whole volume, as a leaf of its own."""
    return partition.cut(whole.detach(), dist.get_rank(group)).clone().requires_grad_(whole.requires_grad)


def slab_error(found: Tensor, whole: Tensor, partition: Partition, group: dist.ProcessGroup) -> float:
    """Relative error of a slab, of the size of the whole volume."""
    expected = partition.cut(whole, dist.get_rank(group))
    if found.shape != expected.shape:
        raise AssertionError(f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / whole.detach().double().norm().clamp(min=1e-30))


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    """The same numbers on every rank."""
    return (
        torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        .to(dtype)
        .requires_grad_(grad)
    )


def smooth(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    """A smooth image, of values 0 to 1."""
    from patchreg.ops.windows import gaussian_smooth

    x = gaussian_smooth(random(shape, seed, grad=False), (1.5, 1.5, 1.5))
    return ((x - x.min()) / (x.max() - x.min())).to(dtype).requires_grad_(grad)


def limit(dtype: torch.dtype) -> float:
    """The largest error that is allowed, relative to one process in float64."""
    return {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
