"""Which implementations of the operations run here, and whether they are right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from patchreg import ops

NATIVE: tuple[str, ...] = ()
"""Operations with a native kernel."""


def list_kernels() -> list[tuple[str, str]]:
    """Every operation, and the backend that ``"auto"`` takes."""
    return [(name, "native" if name in NATIVE else "reference (PyTorch)") for name in sorted(ops.__all__)]


def check_kernels() -> list[tuple[str, float]]:
    """Every operation's relative error in float32 against float64, on made data."""
    generator = torch.Generator().manual_seed(0)

    def made(channels: int) -> Tensor:
        return torch.rand((1, channels, 13, 17, 11), generator=generator, dtype=torch.float64)

    image, other, u, v = made(1), made(1), 3 * made(3) - 1.5, made(3)
    cases: dict[str, Callable[[torch.dtype], Tensor]] = {
        "compose": lambda t: ops.compose(u.to(t), v.to(t)),
        "integrate": lambda t: ops.integrate(v.to(t)),
        "lncc": lambda t: ops.lncc(image.to(t), other.to(t)),
        "mutual_information": lambda t: ops.mutual_information(image.to(t), other.to(t)),
        "warp": lambda t: ops.warp(image.to(t), u.to(t)),
    }
    found = []
    for name in sorted(ops.__all__):
        exact = cases[name](torch.float64)
        found.append((name, float((cases[name](torch.float32) - exact).norm() / exact.norm())))
    return found
