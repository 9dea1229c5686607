"""Reversible blocks: a stack of them keeps one activation, however deep it is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from patchreg.errors import InputError
from patchreg.networks.activation import normalized_relu
from patchreg.networks.backtracking import backtracked, residual
from patchreg.networks.checkpointing import check_policy, run_part
from patchreg.networks.replay import Precision
from patchreg.types import Activations


class ReversibleBlock(nn.Module):
    """``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``, from which ``x1`` and ``x2`` can be found again.

    Args:
        f: keeps the shape of what it is given.
        g: the same.

    Raises:
        InputError: a layer that keeps running statistics. It would see every batch twice, once in each direction.

    References:
        Gomez et al. 2017, arXiv:1707.04585, eq. (6) and (7).
    """

    def __init__(self, f: nn.Module, g: nn.Module) -> None:
        super().__init__()
        self.f, self.g = f, g
        for name, module in self.named_modules():
            if isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats):
                raise InputError(
                    f"{name} is a {type(module).__name__}, whose running statistics would see every batch of a "
                    "reversible block twice: use instance, group or layer normalisation"
                )

    def forward(self, x1: Tensor, x2: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Two tensors of one shape to two more; ``f`` and ``g`` are given ``dtype``, unless it is None."""
        y1 = x1 + residual(self.f, x2, dtype)
        return y1, x2 + residual(self.g, y1, dtype)

    def inverse(self, y1: Tensor, y2: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` was given, up to the rounding of an addition and a subtraction for each of both."""
        x2 = y2 - residual(self.g, y1, dtype)
        return y1 - residual(self.f, x2, dtype), x2


class PreActivated(nn.Module):
    """Instance norm (or none), leaky ReLU, and a convolution that starts at zero. Keeps the shape."""

    def __init__(self, channels: int, kernel_size: int, norm: bool, slope: float) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm3d(channels, affine=True) if norm else None
        self.slope = slope
        self.conv = nn.Conv3d(channels, channels, kernel_size, padding=kernel_size // 2)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(x, self.slope) if self.norm is None else normalized_relu(x, self.norm, self.slope)
        out: Tensor = self.conv(x)
        return out


class ReversibleConvBlock(ReversibleBlock):
    """Convolutions with their activation before them; exactly the identity at the start of training.

    ``f`` and ``g`` are each instance norm, leaky ReLU, convolution. The convolutions start at zero.

    Args:
        channels: of each of the two halves.
        kernel_size: odd side of the kernels.
        norm: instance normalisation (not batch normalisation, see :class:`ReversibleBlock`).
        slope: of the leaky ReLU.

    References:
        He et al. 2016, arXiv:1603.05027, for the order; Goyal et al. 2017, arXiv:1706.02677, section 5.1, for the zeros.
    """

    def __init__(self, channels: int, kernel_size: int = 3, norm: bool = True, slope: float = 0.2) -> None:
        if channels < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(
                f"a reversible block needs channels and an odd kernel_size, got {channels} channels a half and "
                f"kernel_size {kernel_size}"
            )

        super().__init__(*(PreActivated(channels, kernel_size, norm, slope) for _ in range(2)))


class ReversibleSequence(nn.Module):
    """Reversible blocks in a row, on the two halves of a tensor.

    With ``memory: reversible`` only the output is kept for the backward pass, which finds the activations again from
    it, block by block: memory does not grow with depth, for about a third more time. Values are those of the other
    policies; gradients too, up to the rounding with which the inputs are found again (which can also put a voxel on the
    other side of the kink of a ReLU). ``f`` and ``g`` of a block may draw random numbers and may be compiled, but must
    depend on nothing that needs a gradient except their input and their own parameters. There is no second derivative.

    The two streams are float32 where the input has half precision or autocast is on, or rounding would grow from block
    to block. The output is float32 under autocast, and of the input's type otherwise.

    Args:
        blocks: of which each takes what the one before it gives.
        memory: what is kept for the backward pass: ``"stored"``, everything; ``"checkpoint"``, the input of each block;
            ``"reversible"``, the output of the last.
        dim: that is split into halves.

    Raises:
        InputError: no blocks, or an unknown policy.

    References:
        Gomez et al. 2017, arXiv:1707.04585, algorithm 1; Blumberg et al. 2018, arXiv:1808.05577, for 3-D images.
    """

    def __init__(self, blocks: Sequence[ReversibleBlock], memory: Activations = "reversible", dim: int = 1) -> None:
        super().__init__()
        check_policy(memory, True, type(self).__name__)
        if not len(blocks):
            raise InputError("a reversible sequence needs at least one block")
        self.blocks, self.memory, self.dim = nn.ModuleList(blocks), memory, dim

    def extra_repr(self) -> str:
        return f"memory={self.memory!r}, dim={self.dim}"

    def forward(self, x: Tensor) -> Tensor:
        """A tensor whose size along ``dim`` is even, to another of its shape."""
        if x.shape[self.dim] % 2:
            raise InputError(
                f"a reversible sequence splits dim {self.dim} into halves, and its size {x.shape[self.dim]} is odd: "
                "give it an even number of channels"
            )
        if self.memory == "reversible":
            functions = [function for block in self.blocks for function in (block.f, block.g)]
            return _eager(x, functions, self.dim)
        precision = Precision.now(x)
        x1, x2 = x.to(precision.stream).chunk(2, self.dim)
        for block in self.blocks:
            x1, x2 = run_part(self.memory, partial(block, dtype=precision.inner), x1, x2)
        return torch.cat([x1, x2], self.dim).to(precision.output)


# torch.compile of a network goes around the walk back, and into the functions of the blocks
_eager = torch.compiler.disable(backtracked, recursive=False)
