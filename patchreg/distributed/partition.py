"""Who holds which planes of a volume that is split along one dimension."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeAlias

from torch import Tensor

from patchreg.errors import InputError

Span: TypeAlias = tuple[int, int]
"""Planes from the first up to, not including, the second; it may reach beyond a volume."""


@dataclass(frozen=True)
class Partition:
    """The slabs of a volume along one of its dimensions, in the order of the ranks.

    Slabs may differ in size, and some be empty: a coarse level of a network can have fewer planes than there are ranks.

    Args:
        sizes: planes of every rank.
        dim: the dimension of the tensor (B, C, I, J, K) that is split: 2, 3 or 4.

    Raises:
        InputError: no planes, a negative size, another dimension.
    """

    sizes: tuple[int, ...]
    dim: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
        if not self.sizes or min(self.sizes) < 0 or sum(self.sizes) == 0:
            raise InputError(f"a partition needs a size for every rank, none negative, not all zero; got {self.sizes}")
        if self.dim not in (2, 3, 4):
            raise InputError(f"a volume (B, C, I, J, K) is split along dim 2, 3 or 4, got {self.dim}")

    @classmethod
    def even(cls, total: int, ranks: int, dim: int = 2, multiple: int = 1) -> Partition:
        """Slabs as equal as can be, larger ones first.

        Args:
            total: planes of the volume.
            ranks: how many share it.
            dim: see :class:`Partition`.
            multiple: cut only there: the product of a network's strides keeps its slabs aligned on every level.
        """
        if total < 1 or ranks < 1 or multiple < 1:
            raise InputError(f"total, ranks and multiple must be positive, got {total}, {ranks} and {multiple}")
        base, larger = divmod(-(-total // multiple), ranks)
        cuts = [min(total, multiple * (base * rank + min(rank, larger))) for rank in range(ranks + 1)]
        return cls(tuple(b - a for a, b in pairwise(cuts)), dim)

    @cached_property
    def total(self) -> int:
        """Planes of the volume."""
        return sum(self.sizes)

    @property
    def ranks(self) -> int:
        """How many share the volume."""
        return len(self.sizes)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first plane of every rank."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The planes of every rank."""
        return tuple((start, start + size) for start, size in zip(self.starts, self.sizes, strict=True))

    def bounds(self, rank: int) -> Span:
        """The planes of one rank."""
        return self.starts[rank], self.starts[rank] + self.sizes[rank]

    def owner(self, plane: int) -> int:
        """The rank that holds a plane.

        Raises:
            InputError: there is no such plane.
        """
        if not 0 <= plane < self.total:
            raise InputError(f"there is no plane {plane} in a volume of {self.total}")
        return bisect_right(self.starts, plane) - 1

    def cut(self, volume: Tensor, rank: int) -> Tensor:
        """One rank's slab of the whole ``volume``, a view."""
        if volume.ndim != 5 or volume.shape[self.dim] != self.total:
            raise InputError(
                f"dim {self.dim} of the volume must have {self.total} planes, got shape {tuple(volume.shape)}"
            )
        return volume.narrow(self.dim, self.starts[rank], self.sizes[rank])

    def check(self, name: str, local: Tensor, rank: int) -> None:
        """Raise unless ``local`` is shaped as a slab (B, C, I, J, K) of that rank."""
        if local.ndim != 5 or local.shape[self.dim] != self.sizes[rank]:
            raise InputError(
                f"{name} must be rank {rank}'s slab, with {self.sizes[rank]} planes along dim {self.dim} as the partition "
                f"{self.sizes} says, got shape {tuple(local.shape)}"
            )

    def scaled(self, factor: int) -> Partition:
        """Of the volume in which every plane has become ``factor`` planes, as upsampling makes it."""
        return Partition(tuple(factor * size for size in self.sizes), self.dim)

    def after_conv(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Partition:
        """Of the output of a convolution or pooling: an output belongs to the rank that holds its centre.

        The centre of an even kernel is the lower of its two middle taps. A centre in the padding counts as the nearest
        plane. So "same" convolutions keep the partition, and no chain of layers moves it away from where it was.

        Raises:
            InputError: sizes that are no window, or a window larger than the volume.
        """
        window = _Window(kernel, stride, padding, dilation)
        outputs = window.outputs(self.total)
        ends = [window.outputs_before(stop, self.total) for _, stop in self.spans]
        return Partition(tuple(b - a for a, b in pairwise([0, *ends[:-1], outputs])), self.dim)


def reads(partition: Partition, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> tuple[Span, ...]:
    """The input planes that every rank's outputs are made of, those in the padding included.

    The outputs are shared out as :meth:`Partition.after_conv` says; a rank without outputs reads nothing.
    """
    window = _Window(kernel, stride, padding, dilation)
    found = []
    for (start, _), (first, end) in zip(
        partition.spans, partition.after_conv(kernel, stride, padding, dilation).spans, strict=True
    ):
        low, high = first * stride - padding, (end - 1) * stride - padding + window.extent
        found.append((low, high) if first < end else (start, start))
    return tuple(found)


def halo_widths(
    partition: Partition, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> tuple[Span, ...]:
    """The planes (left, right) that every rank's slab must be extended by, for a convolution, a pooling or a window.

    After that the operation is run on the extended slab without padding along the split dimension. A width is negative
    where strides leave out planes at an end of the slab.
    """
    spans = zip(partition.spans, reads(partition, kernel, stride, padding, dilation), strict=True)
    return tuple((start - low, high - stop) for (start, stop), (low, high) in spans)


@dataclass(frozen=True)
class _Window:
    """Output ``o`` reads inputs ``o stride - padding + tap dilation`` for ``tap`` = 0 .. kernel - 1."""

    kernel: int
    stride: int
    padding: int
    dilation: int

    def __post_init__(self) -> None:
        if min(self.kernel, self.stride, self.dilation) < 1 or self.padding < 0:
            raise InputError(
                "kernel, stride and dilation must be positive and padding not negative, got "
                f"{self.kernel}, {self.stride}, {self.dilation} and {self.padding}"
            )

    @property
    def extent(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def outputs(self, total: int) -> int:
        room = total + 2 * self.padding - self.extent
        if room < 0:
            raise InputError(f"a window of {self.extent} planes does not fit into {total} with padding {self.padding}")
        return room // self.stride + 1

    def outputs_before(self, plane: int, total: int) -> int:
        """How many outputs have their centre before ``plane``."""
        outputs = self.outputs(total)
        if plane <= 0 or plane >= total:
            return outputs if plane > 0 else 0
        shift = self.padding - self.dilation * ((self.kernel - 1) // 2)  # the centre of output o is o stride - shift
        return min(max(-(-(plane + shift) // self.stride), 0), outputs)


def clip(span: Span, total: int) -> Span:
    """The part of a span that lies in a volume of ``total`` planes; empty ones have a place in it, too."""
    low = min(max(span[0], 0), total)
    return low, min(max(span[1], low), total)


def overlap(a: Span, b: Span) -> Span:
    """What two spans share; empty where the second is not larger than the first."""
    return max(a[0], b[0]), min(a[1], b[1])


def widened(partition: Partition, left: int, right: int) -> tuple[Span, ...]:
    """Every rank's planes with so many more on either side; an empty slab stays empty."""
    return tuple((a - left, b + right) if a < b else (a, b) for a, b in partition.spans)


def check_same_dim(first: str, a: Partition, second: str, b: Partition) -> None:
    """Raise unless both partitions split the same dimension over as many ranks."""
    if (a.dim, a.ranks) != (b.dim, b.ranks):
        raise InputError(
            f"{first} is split along dim {a.dim} over {a.ranks} ranks and {second} along dim {b.dim} over {b.ranks}: "
            "both must be split alike"
        )


def total_planes(spans: Sequence[Span]) -> int:
    """Planes of all spans together."""
    return sum(max(0, high - low) for low, high in spans)
