"""The planes of a whole volume that a window's outputs are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from patchreg.distributed.partition import Span

Triple: TypeAlias = tuple[int, int, int]


def triple(value: int | Sequence[int]) -> Triple:
    """One number for each axis, from one for all or one for each."""
    if isinstance(value, int):
        return value, value, value
    a, b, c = (value[0],) * 3 if len(value) == 1 else value
    return a, b, c


def replaced(values: Triple, axis: int, value: int) -> Triple:
    """The numbers with another one for an axis."""
    a, b, c = (value if n == axis else old for n, old in enumerate(values))
    return a, b, c


@dataclass(frozen=True)
class Window:
    """Along one axis output ``o`` is made of the planes ``o stride - before + tap dilation``, ``tap = 0 .. kernel - 1``.

    Args:
        kernel: taps.
        stride: planes from one output to the next.
        before: planes of padding before the first.
        after: the same after the last.
        dilation: planes from one tap to the next.
    """

    kernel: int
    stride: int = 1
    before: int = 0
    after: int = 0
    dilation: int = 1

    @property
    def extent(self) -> int:
        """Planes from the first tap to the last."""
        return self.dilation * (self.kernel - 1) + 1

    def outputs(self, total: int, ceil: bool = False) -> int:
        """Of a volume of ``total`` planes; with ``ceil`` a last window may go beyond the padding, if it starts before
        its end."""
        room = total + self.before + self.after - self.extent
        count = (room + (self.stride - 1 if ceil else 0)) // self.stride + 1
        return count - 1 if ceil and (count - 1) * self.stride >= total + self.before else count

    def span(self, outputs: Span) -> Span:
        """The planes, in the padding or not, that some outputs are made of."""
        low, high = outputs
        return low * self.stride - self.before, (high - 1) * self.stride - self.before + self.extent

    def spans(self, outputs: Sequence[Span]) -> tuple[Span, ...]:
        """The same of every rank."""
        return tuple(self.span(own) for own in outputs)
