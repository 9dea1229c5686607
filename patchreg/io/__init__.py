"""Files to volumes and transforms, and back: one file a format."""

from patchreg.io.image import Image, read_grid, read_image, write_image
from patchreg.io.itk import read_transform, write_transform
from patchreg.io.nifti import Storage, write_vectors
from patchreg.io.slab_sink import SlabContents, SlabSink
from patchreg.io.slab_source import SlabKind, SlabSource
from patchreg.io.slabs import open_slabs, staged_slabs
from patchreg.io.staging import staged_file, staged_folder
from patchreg.io.voxels import Kind

__all__ = [
    "Image",
    "Kind",
    "SlabContents",
    "SlabKind",
    "SlabSink",
    "SlabSource",
    "Storage",
    "open_slabs",
    "read_grid",
    "read_image",
    "read_transform",
    "staged_file",
    "staged_folder",
    "staged_slabs",
    "write_image",
    "write_transform",
    "write_vectors",
]
