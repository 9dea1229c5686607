"""Tensors that have a shape and no numbers: code runs on volumes that nobody holds, and nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMALL = 2**15
"""Numbers that a tensor may have and still be computed: matrices, points, tables of labels."""


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers, and never will: not while a graph is traced, which gets them later."""
    return isinstance(tensor, FakeTensor) and not torch.compiler.is_compiling()


class Fakes(TorchDispatchMode):
    """Within the block, tensors of volume size have no numbers.

    Fake is what this object makes, whatever is computed from it, and every result of more than :data:`SMALL` numbers.
    What is small and comes from small tensors is computed as ever, so that the geometry of the world stays known. Gradients
    pass through both. On the CPU, whatever the machine has.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = _Mode(allow_non_fake_inputs=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A fake tensor."""
        with self._mode:
            return torch.empty(tuple(shape), dtype=dtype)

    def like(self, tensor: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """A fake tensor with the type, device and need of a gradient of another, and its shape unless one is given."""
        with self._mode:
            fake = torch.empty(
                tensor.shape if shape is None else tuple(shape), dtype=tensor.dtype, device=tensor.device
            )
        return fake.requires_grad_(tensor.requires_grad)

    def convert(self, module: nn.Module) -> None:
        """Make the parameters and buffers of a module fake, in place: their numbers are lost."""
        known: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                if id(parameter) not in known:
                    fake = self._mode.from_tensor(parameter.detach())
                    known[id(parameter)] = nn.Parameter(fake, parameter.requires_grad)
                part.register_parameter(name, known[id(parameter)])
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = self._mode.from_tensor(buffer)

    def known(self, fake: Tensor, numbers: Tensor) -> Tensor:
        """Numbers in place of a fake tensor of the same shape; gradients pass on to it."""
        result: Tensor = _Known.apply(fake, numbers)
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked for more often than anything else
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if func is torch.ops.aten.bincount.default:  # as many counts as numbers; but here they are known
                return _counts(*args, **kwargs)
            return func(*args, **kwargs)
        if _size((*args, *kwargs.values()), tensors) > SMALL:
            with self._mode:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class _Mode(FakeTensorMode):
    avoid_device_init = True  # or it would ask the driver for devices at every operator


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fake: Tensor, numbers: Tensor) -> Tensor:
        ctx.save_for_backward(fake)
        return numbers.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        (fake,) = ctx.saved_tensors
        return torch.empty_like(fake), None


def _counts(values: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return values.new_empty(minlength, dtype=torch.int64 if weights is None else weights.dtype)


def _size(arguments: Sequence[Any], tensors: Sequence[Tensor]) -> int:
    """About how many numbers an operator gives: a shape among its arguments, or what its tensors broadcast to."""
    shapes = [a for a in arguments if isinstance(a, (list, tuple)) and a and all(isinstance(n, int) for n in a)]
    sizes = [math.prod(shape) for shape in shapes]
    try:
        sizes.append(math.prod(torch.broadcast_shapes(*(t.shape for t in tensors))) if tensors else 0)
    except RuntimeError:  # they are no operands of each other
        sizes.append(max(t.numel() for t in tensors))
    return max(sizes)
