"""What all sharded layers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from patchreg.distributed.scope import Scope, Tracing, current
from patchreg.errors import UnsupportedSharding
from patchreg.networks.surroundings import surroundings

Rule = TypeVar("Rule", bound="ShardedLayer")


class ShardedLayer(nn.Module):
    """A layer that works on slabs within a scope, and is what it was without one.

    A subclass comes before the layer it stands for: ``class ShardedConv3d(ShardedLayer, nn.Conv3d)``. The converter
    changes the class of a module and nothing else: its parameters, its name and its hooks stay.

    It says where the split dimension is in its first input by ``channels_last`` or ``elementwise``, and what it does with
    slabs by :meth:`sharded`.
    """

    channels_last = False
    """Whether it is given tokens (B, I, J, K, C) instead of (B, C, I, J, K)."""

    elementwise = False
    """Whether it is given anything, because it does to every number by itself what it does."""

    stands_for: ClassVar[type[nn.Module]]
    """What it is outside a scope; read by :func:`patchreg.networks.surroundings.kind`."""

    _ran_sharded = False

    def _forward(self, x: Tensor, *others: Any, **options: Any) -> Any:
        return self.run("forward", x, *others, **options)

    forward: Callable[..., Any] = _forward  # typed as that of all modules, so that it goes with any layer's own

    def run(self, method: str, x: Tensor, *others: Any, **options: Any) -> Any:
        """Call a method of the layer, in its plain or its sharded form (``sharded`` for ``forward``, ``sharded_join`` for
        ``join``)."""
        scope = current()
        plain = getattr(super(), method)
        if scope is None:
            if torch._C._current_graph_task_id() == -1:  # not in a backward pass
                self._ran_sharded = False
            elif self._ran_sharded and surroundings() is None:
                raise UnsupportedSharding(
                    f"{type(self).__name__} ran on slabs and is run again in the backward pass, where nothing says so: "
                    "checkpoint with patchreg.networks.checkpointing.run_part, which keeps the surroundings"
                )
            return plain(x, *others, **options)
        dim = None if self.elementwise else scope.dim - 1 if self.channels_last else scope.dim
        if isinstance(scope, Tracing):
            return scope.run(self, x, dim, partial(plain, x, *others, **options))
        self._ran_sharded = True
        name = "sharded" if method == "forward" else f"sharded_{method}"
        total = scope.total(self, None if dim is None else x.shape[dim])
        return getattr(self, name)(x, *others, scope=scope, total=total, **options)

    def unsupported(self) -> str | None:
        """What of its settings it cannot do on slabs. None: nothing."""
        return None

    def sharded(self, x: Tensor, *others: Any, scope: Scope, total: int) -> Any:
        """``forward`` on this rank's part of a tensor with ``total`` planes, within a scope."""
        raise NotImplementedError


RULES: dict[type[nn.Module], type[ShardedLayer]] = {}
"""The sharded layer of every layer that has one."""


def stands_for(plain: type[nn.Module]) -> Callable[[type[Rule]], type[Rule]]:
    """Register a sharded layer: the converter puts it in the place of modules of exactly this class."""

    def register(sharded: type[Rule]) -> type[Rule]:
        RULES[plain] = sharded
        sharded.stands_for = plain
        return sharded

    return register
