"""Layers of networks on slabs of a volume."""

import functools
import importlib
import pkgutil


@functools.cache
def register_all() -> None:
    """Import every layer, which fills :data:`patchreg.distributed.layers.base.RULES`.

    Not with the package: the layers of all networks need what those networks need, and some uses need no network.
    """
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
