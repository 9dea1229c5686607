"""Losses: thin modules over the operations."""

from patchreg.losses.overlap import LabelSet, SoftDice, dice
from patchreg.losses.points import centroid_distance_mm, label_centroids, target_error_mm
from patchreg.losses.regularity import BendingEnergy, Diffusion
from patchreg.losses.similarity import LNCC, MSE, MutualInformation

__all__ = [
    "LNCC",
    "MSE",
    "BendingEnergy",
    "Diffusion",
    "LabelSet",
    "MutualInformation",
    "SoftDice",
    "centroid_distance_mm",
    "dice",
    "label_centroids",
    "target_error_mm",
]
