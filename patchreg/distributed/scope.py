"""What surrounds a network that runs on slabs: how every tensor is split, and among whom."""

from __future__ import annotations

import itertools
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.distributed import communication as comm
from patchreg.distributed.halo import exchange_halo
from patchreg.distributed.layout import Layout
from patchreg.distributed.partition import Partition, Span
from patchreg.errors import UnsupportedSharding
from patchreg.networks.surroundings import surroundings

Totals = MutableMapping[nn.Module, tuple[int, ...]]
"""Of every layer the planes that its inputs have in the whole volume."""

Names = MutableMapping[nn.Module, str]
"""Of every layer where it is in the network."""


@dataclass(frozen=True, eq=False)
class Scope:
    """A network's surroundings while it runs on slabs.

    A tensor is either split as ``layout.of(total)`` says, ``total`` being the planes of the whole, or, where that is None,
    held whole by every rank. Either way gradients are *parts*: of a tensor that all ranks hold, and of every parameter,
    each rank has its own part of the gradient, and their sum over the ranks is the gradient. So parameters need no
    bookkeeping: all of their gradients are added up over the ranks in the end.

    Args:
        layout: of the tensors.
        group: the ranks.
        totals: planes that the layers' inputs have; learned when a network is called.
        names: of the layers, for messages.
        parts: converted networks that were found inside others, and are known with them.
    """

    layout: Layout
    group: dist.ProcessGroup
    totals: Totals = field(default_factory=WeakKeyDictionary)
    names: Names = field(default_factory=WeakKeyDictionary)
    parts: WeakSet[nn.Module] = field(default_factory=WeakSet)

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return comm.rank_in(self.group)

    @property
    def dim(self) -> int:
        """The dimension of (B, C, I, J, K) that is split: 2, 3 or 4. In tokens (B, I, J, K, C) it is one less."""
        return self.layout.base.dim

    def size(self, total: int) -> int:
        """Planes that this rank holds of so many."""
        partition = self.layout.of(total)
        return total if partition is None else partition.sizes[self.rank]

    def span(self, total: int) -> Span:
        """The planes that this rank holds of so many."""
        partition = self.layout.of(total)
        return (0, total) if partition is None else partition.bounds(self.rank)

    def spans(self, total: int) -> tuple[Span, ...]:
        """The planes that every rank holds of so many."""
        partition = self.layout.of(total)
        return ((0, total),) * self.layout.base.ranks if partition is None else partition.spans

    def total(self, layer: nn.Module, size: int | None) -> int:
        """The planes of a whole tensor, of which ``layer`` was given this rank's ``size``.

        Args:
            layer: a sharded one.
            size: of the split dimension; None where the layer does not know which that is, but only ever sees one volume.

        Raises:
            UnsupportedSharding: the layer was never seen with such an input.
        """
        found = [total for total in self.totals.get(layer, ()) if size is None or self.size(total) == size]
        if len(found) != 1:
            raise UnsupportedSharding(
                f"{self.name(layer)} was given {size} planes on rank {self.rank}, which are a part of none of the volumes "
                f"that it sees for this input ({', '.join(map(str, self.totals.get(layer, ()))) or 'it sees none'} "
                "planes): what a network does must depend on the shape of its input alone"
            )
        return found[0]

    def learn(self, totals: Totals, names: Names) -> None:
        """Take in what the layers of a network see.

        Raises:
            UnsupportedSharding: a layer sees volumes that it cannot tell apart by what one of the ranks holds of them.
        """
        for layer, seen in totals.items():
            known = self.totals.get(layer, ())
            if known == seen:
                continue
            together = tuple(sorted({*known, *seen}))
            for one, two in itertools.combinations(together, 2):
                if any(b - a == d - c for (a, b), (c, d) in zip(self.spans(one), self.spans(two), strict=True)):
                    name = f"layer {names[layer]!r} ({type(layer).__name__})"
                    raise UnsupportedSharding(
                        f"{name} is used on volumes of {one} and of {two} planes, of which one of the ranks holds as many: "
                        "take fewer ranks, or another number of planes"
                    )
            self.totals[layer] = together
        self.names.update(names)

    def name(self, layer: nn.Module) -> str:
        """Of a layer, for messages."""
        kind = type(layer).__name__
        return f"layer {self.names[layer]!r} ({kind})" if layer in self.names else kind

    def bring(
        self,
        x: Tensor,
        total: int,
        spans: Sequence[Span],
        dim: int | None = None,
        outside: Literal["zeros", "border"] = "zeros",
    ) -> Tensor:
        """The planes of a tensor that every rank wants, wherever they are.

        The adjoint of this is its gradient: what the ranks that want a plane find is added up where it is held.

        Args:
            x: this rank's part of a tensor of five dimensions.
            total: planes of the whole.
            spans: the planes that every rank wants; they may reach beyond the volume.
            dim: that is split, 1 to 4. None: that of images.
            outside: what is beyond the volume.

        Returns:
            The planes of this rank's span.
        """
        dim = self.dim if dim is None else dim
        partition, (low, high) = self.layout.of(total), spans[self.rank]
        if partition is None:
            return _cut(x, dim, low, high, outside)
        own = partition.spans
        if tuple(spans) == own:
            return x
        widths = [(a - low, high - b) for (a, b), (low, high) in zip(own, spans, strict=True)]
        if dim == 1:  # tokens (B, I, J, K, C) as an image (1, B, I, J, K C)
            tail = x.shape[3:]
            out = exchange_halo(
                x.flatten(3)[None], Partition(partition.sizes, 2), widths, self.group, outside, check=False
            )
            return out[0].unflatten(3, tail)
        return exchange_halo(x, Partition(partition.sizes, dim), widths, self.group, outside, check=False)

    def whole(self, x: Tensor, total: int, dim: int | None = None) -> Tensor:
        """All planes of a tensor, on every rank."""
        return self.bring(x, total, ((0, total),) * self.layout.base.ranks, dim)

    def part(self, x: Tensor, dim: int | None = None) -> Tensor:
        """This rank's part of a tensor of which every rank has made all planes."""
        dim = self.dim if dim is None else dim
        low, high = self.span(x.shape[dim])
        return x.narrow(dim, low, high - low)


def _cut(x: Tensor, dim: int, low: int, high: int, outside: str) -> Tensor:
    """Planes ``low`` up to ``high`` of a whole tensor."""
    total = x.shape[dim]
    first, end = min(max(low, 0), total), min(max(high, 0), total)
    before, after = min(max(-low, 0), high - low), min(max(high - total, 0), high - low)
    x = x.narrow(dim, first, max(0, end - first)) if outside == "zeros" else x
    if not (before or after) or outside == "zeros":
        padding = [0, 0] * (x.ndim - 1 - dim) + [before, after]
        return F.pad(x, padding) if before or after else x
    index = [min(max(plane, 0), total - 1) for plane in range(low, high)]
    return x.index_select(dim, torch.tensor(index, device=x.device))


@dataclass(frozen=True, eq=False)
class Tracing:
    """The surroundings of a network that is run once on whole tensors without numbers, to learn what its layers see.

    Args:
        dim: as in :class:`Scope`.
        run: by which every sharded layer does what it does, which is known to be done right on slabs: called with the
            layer, its first input, the dimension of that which is split (None: any), and what to call.
        parts: converted networks that are called inside this one.
    """

    dim: int
    run: Callable[[nn.Module, Tensor, int | None, Callable[[], Any]], Any]
    parts: WeakSet[nn.Module]


def current() -> Scope | Tracing | None:
    """The scope that a sharded layer runs in. None: on whole tensors, as if it had never been converted."""
    found = surroundings()
    return found if isinstance(found, (Scope, Tracing)) else None
