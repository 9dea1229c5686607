"""Similarity, regularity and overlap of split volumes: values and gradients of one process.

Every rank gives its slabs and gets the value for the whole volume, the same on all ranks; the gradient of a slab is the
slab of one process's gradient, complete on the rank that holds it.
"""

from patchreg.distributed.losses.overlap import soft_dice
from patchreg.distributed.losses.regularity import bending_energy, diffusion
from patchreg.distributed.losses.similarity import lncc, mse, mutual_information

__all__ = ["bending_energy", "diffusion", "lncc", "mse", "mutual_information", "soft_dice"]
