"""World geometry: grids, volumes, transforms, patches. World is RAS+ millimetres in float64."""

from patchreg.spatial import transforms
from patchreg.spatial.collapse import collapse, deformable_part
from patchreg.spatial.foreground import Foreground, foreground
from patchreg.spatial.grid import Grid
from patchreg.spatial.inversion import Inversion, inverse_field, invert
from patchreg.spatial.jacobian import folding_percent, jacobian_determinant
from patchreg.spatial.mapped import MappedGrid
from patchreg.spatial.pyramid import Pyramid
from patchreg.spatial.transforms import Affine, Composite, DisplacementField, Transform, VelocityField
from patchreg.spatial.volume import Volume

__all__ = [
    "Affine",
    "Composite",
    "DisplacementField",
    "Foreground",
    "Grid",
    "Inversion",
    "MappedGrid",
    "Pyramid",
    "Transform",
    "VelocityField",
    "Volume",
    "collapse",
    "deformable_part",
    "folding_percent",
    "foreground",
    "inverse_field",
    "invert",
    "jacobian_determinant",
    "transforms",
]
