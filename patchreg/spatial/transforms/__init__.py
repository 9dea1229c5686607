"""Maps from world points of the fixed image to world points of the moving image."""

from patchreg.spatial.transforms.affine import Affine
from patchreg.spatial.transforms.base import Transform
from patchreg.spatial.transforms.composite import Composite
from patchreg.spatial.transforms.field import DisplacementField, VelocityField

__all__ = ["Affine", "Composite", "DisplacementField", "Transform", "VelocityField"]
