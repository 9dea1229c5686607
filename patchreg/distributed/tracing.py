"""A look at what the layers of a network will see, before anything is sent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map

from patchreg.distributed.layers.base import ShardedLayer
from patchreg.distributed.locality import Locality
from patchreg.distributed.operators import Mark, mark_of, set_mark
from patchreg.distributed.scope import Names, Scope, Totals, Tracing, current
from patchreg.errors import InputError
from patchreg.fake import SMALL, Fakes
from patchreg.networks.surroundings import surrounded

log = logging.getLogger(__name__)


@dataclass
class Trace:
    """What was seen of a network for one shape of its input."""

    totals: Totals = field(default_factory=WeakKeyDictionary)
    names: Names = field(default_factory=WeakKeyDictionary)
    parts: WeakSet[nn.Module] = field(default_factory=WeakSet)


_traces: WeakKeyDictionary[nn.Module, dict[Hashable, Trace]] = WeakKeyDictionary()


def look_ahead(network: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The forward pre-hook of a converted network: within a scope its layers learn what volumes they see a part of.

    Raises:
        UnsupportedSharding: the network does something that cannot be done on slabs; alike on all ranks.
        InputError: a rank has no planes.
    """
    scope = current()
    if isinstance(scope, Tracing):
        scope.parts.add(network)
    if not isinstance(scope, Scope) or network in scope.parts:
        return
    if 0 in scope.layout.base.sizes:
        raise InputError(
            f"every rank needs planes of the input, got slabs of {scope.layout.base.sizes}: take fewer ranks"
        )
    known = _traces.setdefault(network, {})
    key = _key(network, scope, args, options)
    if key not in known:
        known[key] = _trace(network, scope, args, options)
        _report(known[key], [trace for other, trace in known.items() if other != key], scope)
    scope.learn(known[key].totals, known[key].names)
    scope.parts.update(part for part in known[key].parts if part is not network)


def _split(scope: Scope, leaf: Any) -> bool:
    """Whether an argument is this rank's slab of a volume."""
    return isinstance(leaf, Tensor) and leaf.ndim == 5 and leaf.shape[scope.dim] == scope.size(scope.layout.base.total)


def _whole(scope: Scope, leaf: Tensor) -> list[int]:
    """The shape of an argument in one process."""
    shape = list(leaf.shape)
    if _split(scope, leaf):
        shape[scope.dim] = scope.layout.base.total
    return shape


def _key(network: nn.Module, scope: Scope, args: tuple[Any, ...], options: dict[str, Any]) -> Hashable:
    """All that may decide what a network does."""
    found: list[Hashable] = [scope.layout.base, network.training, torch.is_grad_enabled(), *map(id, network.modules())]
    for leaf in tree_leaves((args, options)):
        if isinstance(leaf, Tensor):
            device = leaf.device.type
            autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
            found.append((*_whole(scope, leaf), leaf.dtype, device, _split(scope, leaf), autocast))
        else:
            found.append(leaf if isinstance(leaf, Hashable) else type(leaf).__name__)
    return tuple(found)


def _trace(network: nn.Module, scope: Scope, args: tuple[Any, ...], options: dict[str, Any]) -> Trace:
    """Run a network on whole fake tensors, without touching its own."""
    fakes = Fakes()
    watch = _Watch(network, scope)
    known: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        """A copy with numbers where they are few: they may decide what is done."""
        if id(tensor) not in known:
            few = tensor.numel() <= SMALL and not tensor.requires_grad
            known[id(tensor)] = tensor.detach().clone() if few else fakes.like(tensor)
        return known[id(tensor)]

    def argument(leaf: Any) -> Any:
        if not _split(scope, leaf):
            return stand_in(leaf) if isinstance(leaf, Tensor) else leaf
        fake = fakes.like(leaf, _whole(scope, leaf))
        watch.locality.mark(fake, scope.dim)
        return fake

    # by the places where modules have them, each once: a module may be in several places, and a parameter in several modules
    tensors = {
        f"{prefix}.{name}".removeprefix("."): tensor
        for prefix, module in network.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    stand_ins = {name: stand_in(tensor) for name, tensor in tensors.items()}
    devices = [t.device for t in tensors.values()] + [t.device for t in tree_leaves((args, options)) if _is_on_gpu(t)]
    gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    grad = torch.is_grad_enabled()
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(grad),
        saved_tensors_hooks(Tensor.detach, lambda kept: kept),  # or hooks of others may keep what nothing will free
        torch.random.fork_rng(gpus, device_type="cuda"),
        fakes,
        watch.following(),
    ):
        args, options = tree_map(argument, (args, options))
        with surrounded(Tracing(scope.dim, watch.run, watch.trace.parts)):
            torch.func.functional_call(network, stand_ins, args, options, tie_weights=False)
    return watch.trace


def _is_on_gpu(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cuda"


class _Watch:
    """Follows a network while it is traced: which layer runs, what it sees, and what others do to split tensors."""

    def __init__(self, network: nn.Module, scope: Scope) -> None:
        self.scope, self.trace = scope, Trace()
        self.locality = Locality(scope.layout, self.where)
        self._network = network
        self._names = {module: name for name, module in network.named_modules()}
        self._running: list[nn.Module] = []

    def where(self) -> str:
        """The innermost module that runs, for messages."""
        module = self._running[-1] if self._running else self._network
        name = self._names.get(module, "")
        return f"layer {name!r} ({_kind(module)})" if name else f"the network ({_kind(module)})"

    @contextmanager
    def following(self) -> Iterator[None]:
        """Within the block modules are known while they run, and operators are looked at."""

        def enter(module: nn.Module, _: Any) -> None:
            self._running.append(module)
            if isinstance(module, nn.SyncBatchNorm):  # it would wait for processes that look at this, too, or do not
                self.locality.refuse("exchanges its statistics itself: do not convert batch normalisation before")

        def leave(*_: Any) -> None:
            self._running.pop()

        handles = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(enter, prepend=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            with self.locality:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, layer: nn.Module, x: Tensor, dim: int | None, call: Callable[[], Any]) -> Any:
        """A sharded layer, in its plain form.

        Args:
            layer: which.
            x: its first input.
            dim: that should be split in it. None: any.
            call: the plain form.
        """
        refused = layer.unsupported() if isinstance(layer, ShardedLayer) else None
        if refused is not None:
            self.locality.refuse(refused)
        if dim is None:
            return self._elementwise(layer, x, call)
        if not self.locality.trusting:
            self.locality.check_split(x, dim)
        self._note(layer, x.shape[dim])
        with self.locality.trust():
            out = call()
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.locality.mark(tensor, dim if tensor.ndim == 5 else None)
        return out

    def _elementwise(self, layer: nn.Module, x: Tensor, call: Callable[[], Any]) -> Any:
        """A layer that only has to know whether the ranks hold slabs or all the same: of planes without number 0."""
        mark, trusting = mark_of(x), self.locality.trusting
        with self.locality.trust():
            out: Tensor = call()
        if trusting:
            if out is not x and layer.training:
                self.locality.refuse("draws numbers inside a layer that does not know of it")
            return out
        self._note(layer, mark.total(x) if isinstance(mark, Mark) else 0)
        if len(self.trace.totals[layer]) > 1:
            self.locality.refuse("is used on volumes of several sizes")
        set_mark(out, mark)
        return out

    def _note(self, layer: nn.Module, total: int) -> None:
        self.trace.totals[layer] = tuple(sorted({*self.trace.totals.get(layer, ()), total}))
        self.trace.names[layer] = self._names.get(layer, "")


def _kind(module: nn.Module) -> str:
    """The class of a module, as its author knows it."""
    return type(module).__name__.removeprefix("Sharded") or type(module).__name__


def _report(trace: Trace, before: list[Trace], scope: Scope) -> None:
    """Say which levels every rank holds whole: they save no memory and no time."""
    if scope.rank:
        return
    said = {total for other in before for totals in other.totals.values() for total in totals}
    for layer, totals in trace.totals.items():
        for total in totals:
            if total and total not in said and scope.layout.of(total) is None:
                said.add(total)
                log.info("%s: every rank holds all %d planes, too few to split", trace.names[layer] or "input", total)
