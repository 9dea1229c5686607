"""Networks: ``forward(fixed, moving)`` to a displacement in voxels of the patch, or to an affine map in its frame."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from patchreg.networks.elongation import Elongated, elongate
from patchreg.networks.espcn import ESPCN
from patchreg.networks.keypoints import KeypointAffine
from patchreg.networks.reversible import ReversibleBlock, ReversibleConvBlock, ReversibleSequence
from patchreg.networks.unet import UNet
from patchreg.networks.voxelmorph import VoxelMorph

if TYPE_CHECKING:
    from patchreg.networks.swin import SwinSize
    from patchreg.networks.transmorph import TransMorph
    from patchreg.networks.transmorph_affine import TransMorphAffine

_WITH_TIMM = {"SwinSize": "swin", "TransMorph": "transmorph", "TransMorphAffine": "transmorph_affine"}

__all__ = [
    "ESPCN",
    "Elongated",
    "KeypointAffine",
    "ReversibleBlock",
    "ReversibleConvBlock",
    "ReversibleSequence",
    "SwinSize",
    "TransMorph",
    "TransMorphAffine",
    "UNet",
    "VoxelMorph",
    "elongate",
]


def __getattr__(name: str) -> Any:
    """What is made of timm's layers is imported when it is first used: timm imports all its models, for seconds."""
    if name not in _WITH_TIMM:
        raise AttributeError(f"module 'patchreg.networks' has no attribute {name!r}")
    return getattr(importlib.import_module(f"patchreg.networks.{_WITH_TIMM[name]}"), name)
