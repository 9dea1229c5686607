"""Pictures of images and transforms in the world."""

from patchreg.visual.figures import columns_figure, pixels, png, registration_figure
from patchreg.visual.planes import Plane, planes

__all__ = ["Plane", "columns_figure", "pixels", "planes", "png", "registration_figure"]
