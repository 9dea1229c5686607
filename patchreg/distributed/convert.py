"""Any network made one that runs on slabs."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from patchreg.distributed.layers import register_all
from patchreg.distributed.layers.base import RULES
from patchreg.distributed.tracing import look_ahead

Network = TypeVar("Network", bound=nn.Module)


def convert_sharded(network: Network) -> Network:
    """Let a network run on slabs of volumes, in place.

    Layers that have a sharded form take it; parameters, names and hooks stay, and outside a
    :class:`patchreg.distributed.scope.Scope` every layer does what it did. Within one the network is first run on tensors
    without numbers, once for every shape of its input, where it raises what it cannot do on slabs, before anything is
    sent. A network can be converted twice, and parts of it alone.

    Args:
        network: with layers of exactly the classes in :data:`patchreg.distributed.layers.base.RULES`; a subclass has no
            sharded form, as nobody knows what it does.

    Returns:
        The network itself.
    """
    register_all()
    for module in network.modules():
        if type(module) in RULES:
            module.__class__ = RULES[type(module)]
    if look_ahead not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(look_ahead, with_kwargs=True)
    return network


def convert_plain(network: Network) -> Network:
    """Undo :func:`convert_sharded`, in place."""
    plain: dict[type[nn.Module], type[nn.Module]] = {sharded: kind for kind, sharded in RULES.items()}
    for module in network.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
            module.__dict__.pop("_ran_sharded", None)
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is look_ahead]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    return network
