"""3-D image registration with networks, for volumes of any size, spacing and orientation."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from patchreg import losses, ops
    from patchreg.inference import Registration, apply_transform, load_model, register
    from patchreg.spatial import Grid, Volume, transforms

_HOMES = {
    "Grid": "patchreg.spatial",
    "Registration": "patchreg.inference",
    "Volume": "patchreg.spatial",
    "apply_transform": "patchreg.inference",
    "load_model": "patchreg.inference",
    "losses": "patchreg",
    "ops": "patchreg",
    "register": "patchreg.inference",
    "transforms": "patchreg.spatial",
}

__all__ = [
    "Grid",
    "Registration",
    "Volume",
    "__version__",
    "apply_transform",
    "load_model",
    "losses",
    "ops",
    "register",
    "transforms",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``patchreg --help`` answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'patchreg' has no attribute {name!r}")
    home = _HOMES[name]
    if home == "patchreg":
        return importlib.import_module(f"patchreg.{name}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
