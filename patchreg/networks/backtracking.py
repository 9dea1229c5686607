"""The autograd function of a reversible sequence: it keeps its output, and walks back from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from patchreg.errors import InputError
from patchreg.networks.replay import Precision, Randomness, check_backward


def residual(function: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What a reversible block adds to one stream, made from the other.

    Args:
        function: ``f`` or ``g`` of the block.
        x: the other stream.
        dtype: what the function is given. None: the stream as it is.

    Raises:
        InputError: the function does not keep the shape.
    """
    out: Tensor = function(x if dtype is None else x.to(dtype))
    if out.shape != x.shape:
        raise InputError(
            f"f and g of a reversible block must keep the shape of their input, which is {tuple(x.shape)}; "
            f"{type(function).__name__} gives {tuple(out.shape)}"
        )
    return out


def backtracked(x: Tensor, functions: Sequence[nn.Module], dim: int) -> Tensor:
    """Run a reversible sequence so that only its output is kept for the backward pass.

    Args:
        x: of even size along ``dim``: the two streams.
        functions: ``f, g, f, g, ...`` of the blocks; the first adds to the first stream, the next to the second.
        dim: along which the streams lie.

    Returns:
        The two streams after the last function, as ``x`` has them.

    Raises:
        NoGradient: in the backward pass, where a second derivative is asked for, or the parameters have changed.

    References:
        Gomez et al. 2017, arXiv:1707.04585, algorithm 1.
    """
    precision = Precision.now(x)
    if not torch.is_grad_enabled():
        return _run(x, functions, dim, precision, None).to(precision.output)
    parameters = {id(p): p for function in functions for p in function.parameters() if p.requires_grad}
    result: Tensor = _Backtracking.apply(x, functions, dim, precision, *parameters.values())
    return result.to(precision.output)


def _run(
    x: Tensor, functions: Sequence[nn.Module], dim: int, precision: Precision, randomness: list[Randomness] | None
) -> Tensor:
    """The forward pass, without a graph; what the generators were before every function is noted in ``randomness``."""
    streams = list(x.to(precision.stream).chunk(2, dim))
    own = [x.dtype != precision.stream] * 2  # what nobody else holds may change in place
    with precision.again():
        for index, function in enumerate(functions):
            target, source = index % 2, 1 - index % 2
            if randomness is None:
                out = residual(function, streams[source], precision.inner)
            else:
                randomness.append(Randomness.now(x))
                version = streams[source]._version
                out = residual(function, streams[source], precision.inner)
                if streams[source]._version != version:
                    raise InputError(
                        f"{type(function).__name__}, f or g of a reversible block, changes its input in place: let its "
                        "first layer make a new tensor (inplace=False)"
                    )
            _add(streams, own, target, out)
            del out  # half a volume, while the next function runs
    return torch.cat(streams, dim)


def _add(streams: list[Tensor], own: list[bool], target: int, x: Tensor, sign: int = 1) -> None:
    if own[target]:
        streams[target].add_(x, alpha=sign)
    else:
        streams[target] = torch.add(streams[target], x, alpha=sign)
        own[target] = True


class _Backtracking(torch.autograd.Function):
    """The streams after the last function; the parameters are inputs, so that autograd knows of them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, functions: Sequence[nn.Module], dim: int, precision: Precision, *parameters: Tensor
    ) -> Tensor:
        ctx.functions, ctx.dim, ctx.precision = functions, dim, precision
        ctx.parameters = parameters  # not saved: hooks that move what is saved elsewhere need not move these
        ctx.versions = [p._version for p in parameters]
        ctx.input_dtype, ctx.randomness = x.dtype, []
        y = _run(x, functions, dim, precision, ctx.randomness)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        check_backward("a reversible sequence", ctx.parameters, ctx.versions)
        walk = _Walk(ctx, grad_y)
        grad_x = walk.back()
        return grad_x, None, None, None, *(walk.gradients.get(id(p)) for p in ctx.parameters)


class _Walk:
    """One backward pass: the streams and their gradients on the way from the output to the input."""

    def __init__(self, ctx: Any, grad_y: Tensor) -> None:
        self.ctx = ctx
        self.precision: Precision = ctx.precision
        (y,) = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained, nothing else holds y: it ends with the streams
        self.streams = list(y.chunk(2, ctx.dim))
        self.grads = list(grad_y.to(self.precision.stream).chunk(2, ctx.dim))
        self.own_streams, self.own_grads = [False, False], [False, False]
        self.wanted = {id(p) for p, need in zip(ctx.parameters, ctx.needs_input_grad[4:], strict=True) if need}
        self.gradients: dict[int, Tensor] = {}

    def back(self) -> Tensor | None:
        """The gradient of the input, where it is needed; those of the parameters are gathered on the way."""
        functions, to_input = self.ctx.functions, self.ctx.needs_input_grad[0]
        trained = [any(id(p) in self.wanted for p in function.parameters()) for function in functions]
        first = 0 if to_input or not any(trained) else trained.index(True)
        with self.precision.again():
            for index in reversed(range(first, len(functions))):
                self.step(index, to_input or index > first, index > first)
        if not to_input:
            return None
        self.streams.clear()
        return torch.cat(self.grads, self.ctx.dim).to(self.ctx.input_dtype)

    def step(self, index: int, onwards: bool, restore: bool) -> None:
        """Undo one function and add what it gives to the gradients.

        Args:
            index: of the function.
            onwards: whether anything before it needs a gradient.
            restore: whether anything before it needs the stream that it was added to.
        """
        function, target, source = self.ctx.functions[index], index % 2, 1 - index % 2
        inputs = [p for p in function.parameters() if id(p) in self.wanted]
        with torch.enable_grad(), self.ctx.randomness[index].again():
            given = self.streams[source].detach().requires_grad_(onwards)
            out = residual(function, given, self.precision.inner)
        if restore:
            _add(self.streams, self.own_streams, target, out.detach(), sign=-1)
        if not out.requires_grad:
            return
        edge, dtype = get_gradient_edge(out), out.dtype
        del out  # the graph does without it: half a volume less
        leaves = [given, *inputs] if onwards else inputs
        found = torch.autograd.grad([edge], leaves, [self.grads[target].to(dtype)], allow_unused=True)
        if onwards and found[0] is not None:
            _add(self.grads, self.own_grads, source, found[0])
        for parameter, value in zip(inputs, found[len(leaves) - len(inputs) :], strict=True):
            if value is not None:
                self.gather(parameter, value, self.grads[target])

    def gather(self, parameter: Tensor, value: Tensor, stream: Tensor) -> None:
        """Add to a parameter's gradient, which may be shared by several functions."""
        key = id(parameter)
        if key in self.gradients:
            self.gradients[key] = self.gradients[key] + value
        elif value.untyped_storage()._cdata == stream.untyped_storage()._cdata:
            self.gradients[key] = value.clone()  # of a weight added to the stream, whose gradient goes on changing
        else:
            self.gradients[key] = value
