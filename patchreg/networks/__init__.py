"""Networks: ``forward(fixed, moving)`` to a displacement in voxels of the patch, or to an affine map in its frame."""

from patchreg.networks.keypoints import KeypointAffine
from patchreg.networks.unet import UNet
from patchreg.networks.voxelmorph import VoxelMorph

__all__ = ["KeypointAffine", "UNet", "VoxelMorph"]
