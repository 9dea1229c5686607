"""Files to volumes and transforms, and back: one file a format."""

from patchreg.io.image import Image, Kind, read_grid, read_image, write_image
from patchreg.io.itk import read_transform, write_transform
from patchreg.io.nifti import Storage, write_vectors
from patchreg.io.staging import staged_file, staged_folder

__all__ = [
    "Image",
    "Kind",
    "Storage",
    "read_grid",
    "read_image",
    "read_transform",
    "staged_file",
    "staged_folder",
    "write_image",
    "write_transform",
    "write_vectors",
]
