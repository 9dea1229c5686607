"""Looks at a network while it is traced: what is done to split tensors outside sharded layers must not join planes.

A dimension that is split is followed through the operators that work plane by plane, whether it moves, or is merged with
others by a view. Whatever is not known to do so is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from patchreg.distributed.layout import Layout
from patchreg.distributed.operators import (
    CONSTANT,
    CONSTANTS,
    Arguments,
    Mark,
    NotLocal,
    is_random,
    keeps_constants,
    mark_of,
    rule_of,
    set_mark,
)
from patchreg.errors import UnsupportedSharding


class Locality(TorchDispatchMode):
    """Within the block every operator on a split tensor is followed, or refused.

    Args:
        layout: says what is split.
        where: the layer that runs, for messages.
    """

    def __init__(self, layout: Layout, where: Callable[[], str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layout, self._where, self._depth = layout, where, 0

    @property
    def trusting(self) -> bool:
        """Whether what runs is known to be right."""
        return self._depth > 0

    @contextmanager
    def trust(self) -> Iterator[None]:
        """Within the block nothing is looked at."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def mark(self, tensor: Tensor, dim: int | None) -> None:
        """Note that a tensor is split along a dimension, unless it has so few planes that all ranks hold it whole."""
        split = dim is not None and self.layout.of(tensor.shape[dim]) is not None
        set_mark(tensor, Mark(dim) if dim is not None and split else None)

    def check_split(self, x: Tensor, dim: int) -> None:
        """Refuse the input of a sharded layer that is not split as such a layer takes it to be.

        Raises:
            UnsupportedSharding: see above.
        """
        mark = mark_of(x)
        if isinstance(mark, Mark):
            if mark != Mark(dim):
                self.refuse(f"is given a tensor of shape {tuple(x.shape)} that is not split along dim {dim}")
        elif self.layout.of(x.shape[dim]) is not None:
            self.refuse(f"is given a tensor of shape {tuple(x.shape)} that was not made from the split input")

    def refuse(self, why: str, error: Exception | None = None) -> NoReturn:
        """Raise, naming the layer that runs."""
        raise UnsupportedSharding(f"{self._where()} cannot run on slabs of a volume: it {why}") from error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._depth or func.namespace == "prim":
            return self._run(func, args, kwargs)
        name = func.overloadpacket.__name__
        given = Arguments(func, args, kwargs, None)
        if not given.marked:
            constant = keeps_constants(func) and all(mark_of(t) == CONSTANT for t in given.tensors)
            out = self._run(func, args, kwargs)
            for tensor in Arguments(func, args, kwargs, out).outs:
                set_mark(tensor, CONSTANT if constant and (given.tensors or name in CONSTANTS) else None)
            return out
        rule = rule_of(func)
        if rule is None or is_random(func):
            what = "draws numbers for every voxel by" if is_random(func) else "uses"
            self.refuse(f"{what} {func.namespace}::{name}, outside a layer that is known to do so right")
        try:
            first = given.tensors[0]
            if name.endswith("_") and not isinstance(mark_of(first), Mark):
                raise NotLocal("a tensor that was not made from the split input is changed by one that was")
            out = self._run(func, args, kwargs)
            given = Arguments(func, args, kwargs, out)
            mark = rule(given)
        except NotLocal as error:
            self.refuse(f"uses {func.namespace}::{name}: {error}", error)
        for tensor in given.outs:
            set_mark(tensor, mark if mark is not None else CONSTANT)
        return out

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            self.refuse(f"looks at numbers to decide what to do ({func})", error)
