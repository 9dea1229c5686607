"""Images that no process holds as a whole: read and written by slabs, the planes of some range."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

from patchreg.errors import InputError
from patchreg.io import omezarr
from patchreg.io.nifti_slabs import CompressedNiftiSink, NiftiSink, NiftiSource
from patchreg.io.omezarr_slabs import OmeZarrSink, OmeZarrSource
from patchreg.io.slab_sink import SlabContents, SlabSink
from patchreg.io.slab_source import SlabKind, SlabSource
from patchreg.io.staging import reporting, staged_file, staged_store

UNSLABBED = (".nrrd", ".nhdr", ".mha", ".mhd")


def open_slabs(path: Path | str, kind: SlabKind = "image", level: int = 0) -> SlabSource:
    """Open an image file to read planes of it; no voxel is read yet.

    | file | a slab along K | along J | along I |
    |---|---|---|---|
    | ``.nii`` | is read alone | is read alone | takes reading the file |
    | ``.nii.gz`` | takes unpacking all before it; slabs in order cost one pass in all | one pass each | one pass each |
    | OME-Zarr | the chunks that hold it | the same | the same |

    Args:
        path: ``.nii``, ``.nii.gz`` (``.mgh``, ``.mgz``), or the folder of an OME-Zarr image. A file of several volumes
            is read as channels.
        kind: ``"image"``, ``"labels"``, ``"mask"``, or ``"displacement"`` for the vectors of an ITK displacement field.
        level: of an OME-Zarr pyramid; 0 is the finest.

    Raises:
        InputError: no such file, not an image, or of a format that cannot be read in part.
        GeometryError: an affine that is singular or not finite.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise InputError(f"{path}: no such file")
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read (permission denied)") from error
    if omezarr.is_store(path):
        return OmeZarrSource.open(path, kind, level)
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give one image file")
    if level != 0:
        raise InputError(f"{path}: has one level; levels other than 0 are OME-Zarr's, got {level}")
    if path.name.lower().endswith(UNSLABBED):
        raise InputError(f"{path}: this format cannot be read by planes; convert it to .nii or .ome.zarr")
    return NiftiSource.open(path, kind)


@contextmanager
def staged_slabs(
    target: Path | str, contents: SlabContents, dim: int = 0, cuts: Sequence[int] = ()
) -> Iterator[SlabSink]:
    """A file under a temporary name for several processes to fill with slabs, moved to its name when the block ends well.

    One process runs the block and sends the sink to the others, which only call :meth:`SlabSink.write`. It must not leave
    the block before they are done, which it hears by a barrier or their end:

        with ExitStack() as stack:
            sinks = [stack.enter_context(staged_slabs(path, contents, dim, partition.starts)) if rank == 0 else None]
            torch.distributed.broadcast_object_list(sinks)
            sinks[0].write(start, slab)
            torch.distributed.barrier()

    When the block fails, or planes are missing at its end, nothing is left.

    | file | slabs along | what writing costs |
    |---|---|---|
    | ``.nii`` | any dimension | space for all is taken at once; along K and J runs of bytes, along I pages of the file |
    | ``.nii.gz`` | K alone | every process compresses its slabs; the one that leaves the block puts them together |
    | ``.zarr`` | any dimension | every chunk is compressed by the process that has it |

    Processes of several machines share ``.nii`` on a parallel file system (Lustre, GPFS, BeeGFS) alone: on NFS two of
    them lose each other's bytes where their slabs meet in a page, along I everywhere. The others are safe.

    Args:
        target: ends in ``.nii``, ``.nii.gz`` or ``.zarr`` (usually ``.ome.zarr``).
        contents: what the file holds.
        dim: array dimension along which the image is cut: 0, 1, 2 for I, J, K.
        cuts: planes at which slabs begin, as :attr:`Partition.starts` has them. The chunks of OME-Zarr end there; without
            cuts they have 64 planes, and slabs begin at multiples of 64. Multiples of 16 or more make good chunks.

    Raises:
        InputError: another suffix, or contents that the format cannot hold.
        OutputError: the target cannot be written, the disk is full, or planes were not written when the block ended.
    """
    target = Path(target)
    if dim not in (0, 1, 2):
        raise InputError(f"{target}: slabs are cut along dim 0, 1 or 2 of (I, J, K), got {dim}")
    stage: Callable[[Path], AbstractContextManager[Path]] = staged_file
    make: Callable[[Path, Path, SlabContents, int], SlabSink]
    if target.name.endswith(".zarr"):
        stage, make = staged_store, partial(OmeZarrSink.make, cuts=cuts)
        if target.is_dir() and any(target.iterdir()) and not omezarr.holds_zarr(target):
            raise InputError(f"{target}: is a folder of other files; choose another name")
    elif target.name.endswith(".nii.gz"):
        make = CompressedNiftiSink.make
    elif target.name.endswith(".nii"):
        make = NiftiSink.make
    else:
        raise InputError(
            f"{target}: slabs are written as NIfTI or OME-Zarr; end the name in .nii, .nii.gz or .ome.zarr"
        )
    with stage(target) as staged:
        sink = make(target, staged, contents, dim)
        reporting(target, sink.begin)
        yield sink
        reporting(target, sink.finish)
