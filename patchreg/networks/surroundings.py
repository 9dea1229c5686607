"""What surrounds a network while it runs, kept for those of its parts that run again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_around: ContextVar[object | None] = ContextVar("surroundings", default=None)


def surroundings() -> object | None:
    """What whoever called the network wants its parts to know. None: nothing."""
    return _around.get()


@contextmanager
def surrounded(by: object | None) -> Iterator[None]:
    """Within the block these are the surroundings, in this thread.

    The backward pass runs later, and on a GPU in another thread: what runs a part of a network again must enter the
    surroundings that it first ran in, as :func:`patchreg.networks.checkpointing.run_part` does.
    """
    token = _around.set(by)
    try:
        yield
    finally:
        _around.reset(token)


ALONE = object()
"""Surroundings in which every layer does what it does without any."""


def kind(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer that decides what can be done with its parameters.

    A layer that has taken a form for some surroundings says by ``stands_for`` what it is without them.
    """
    plain = surroundings() is None or surroundings() is ALONE
    found: type[nn.Module] = getattr(layer, "stands_for", type(layer)) if plain else type(layer)
    return found
