"""Layers of networks on slabs of a volume.

Importing the package registers every one: see :data:`patchreg.distributed.layers.base.RULES`.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
