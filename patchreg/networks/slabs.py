"""A part of a network slab by slab, so that its features never exist as a whole, now or in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchreg.networks.replay import Precision, check_backward

THICKNESS = 32
"""Rows of the result that are made at a time. Fewer take less memory, and more time for the rows around them."""


@dataclass(frozen=True)
class Slabbed:
    """What runs slab by slab along dim 2.

    Args:
        run: from tensors (B, C, I, J, K) to one, by convolutions and what works voxel by voxel; it draws no random
            numbers.
        parameters: of ``run``.
        scales: rows of each input for one row of the result.
        halo: rows at the border of a slab of the result that change with what lies beyond it.
    """

    run: Callable[..., Tensor]
    parameters: Sequence[Tensor]
    scales: Sequence[float]
    halo: int

    def slabs(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """Rows of the result, and these with the rows around them on which they depend."""
        for start in range(0, rows, THICKNESS):
            stop = min(rows, start + THICKNESS)
            yield slice(start, stop), slice(max(0, start - self.halo), min(rows, stop + self.halo))

    def rows(self, x: Tensor, index: int, around: slice) -> Tensor:
        """Of input ``index`` the rows for these rows of the result."""
        scale = self.scales[index]
        return x[:, :, int(around.start * scale) : int(around.stop * scale)]

    def slab(self, inputs: Sequence[Tensor], inner: slice, around: slice) -> Tensor:
        """Rows ``inner`` of the result, from the inputs' rows for ``around``."""
        return self.run(*inputs)[:, :, inner.start - around.start : inner.stop - around.start]


def in_slabs(part: Slabbed, *inputs: Tensor) -> Tensor:
    """``part.run(*inputs)``, up to rounding, of which nothing is kept for the backward pass but the inputs.

    Args:
        part: see :class:`Slabbed`.
        inputs: (B, C, I, J, K), of as many rows I as the scales say.

    Raises:
        NoGradient: in the backward pass, where a second derivative is asked for, or the parameters have changed.

    References:
        Chen et al. 2016, arXiv:1604.06174, for running parts again.
    """
    result: Tensor = _eager(part, *inputs, *part.parameters)
    return result


class _Slabs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Slabbed, *tensors: Tensor) -> Tensor:
        inputs = tensors[: len(part.scales)]
        ctx.part, ctx.precision = part, Precision.now(inputs[0])
        ctx.versions = [p._version for p in part.parameters]
        ctx.save_for_backward(*inputs)
        pieces = []
        with ctx.precision.again():
            for inner, around in part.slabs(round(inputs[0].shape[2] / part.scales[0])):
                given = [part.rows(x, index, around) for index, x in enumerate(inputs)]
                pieces.append(part.slab(given, inner, around))
        return torch.cat(pieces, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        part: Slabbed = ctx.part
        check_backward("a part of a network that runs slab by slab", part.parameters, ctx.versions)
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        found = [torch.zeros_like(x) if n else None for x, n in zip([*inputs, *part.parameters], needs, strict=True)]
        with ctx.precision.again():
            for inner, around in part.slabs(grad.shape[2]):
                with torch.enable_grad():
                    given = [part.rows(x, i, around).detach().requires_grad_(needs[i]) for i, x in enumerate(inputs)]
                    out = part.slab(given, inner, around)
                leaves = [t for t, n in zip([*given, *part.parameters], needs, strict=True) if n]
                gradients = iter(torch.autograd.grad(out, leaves, grad[:, :, inner]))
                del out
                for index, known in enumerate(found):
                    if known is not None:
                        (part.rows(known, index, around) if index < len(inputs) else known).add_(next(gradients))
        return None, *found


def _apply(part: Slabbed, *tensors: Tensor) -> Any:
    return _Slabs.apply(part, *tensors)


# torch.compile of a network goes around the slabs
_eager = torch.compiler.disable(_apply)
