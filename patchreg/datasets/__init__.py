"""Pairs to train on: from files, from label maps, from nothing."""

from patchreg.datasets.augmentation import WorldAugmentation
from patchreg.datasets.modules import ManifestDataModule, PairDataModule, SynthesisDataModule
from patchreg.datasets.pair import Pair
from patchreg.datasets.phantom import BRAIN_LABELS, phantom
from patchreg.datasets.super_resolution import SuperResolutionDataModule
from patchreg.datasets.synthesis import Synthesis

__all__ = [
    "BRAIN_LABELS",
    "ManifestDataModule",
    "Pair",
    "PairDataModule",
    "SuperResolutionDataModule",
    "Synthesis",
    "SynthesisDataModule",
    "WorldAugmentation",
    "phantom",
]
