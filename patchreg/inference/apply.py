"""Taking another image, or a label map, through a transform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchreg.errors import InputError
from patchreg.inference.registration import inverse_on, label_storage, resample
from patchreg.io import nifti, read_grid, read_image, read_transform, staged_file
from patchreg.io.nifti import check_suffix
from patchreg.spatial import DisplacementField, Transform, Volume
from patchreg.types import Interpolation


def apply_transform(
    transform: str | Path | Transform,
    image: Any,
    reference: Any,
    interpolation: Interpolation = "linear",
    inverse: bool = False,
) -> Volume:
    """Resample an image onto a reference grid through a transform.

    Args:
        transform: an ITK file, an ITK displacement field, or a transform; reference world to image world.
        image: a path, a nibabel or a torchio image.
        reference: an image whose grid the result has, at any resolution.
        interpolation: ``"linear"``; ``"nearest"``; ``"label"`` for label maps: the label with the most weight.
        inverse: take the inverse of the transform, found numerically on the reference grid.

    Returns:
        The image on the reference grid.

    Raises:
        InputError: a file that cannot be used.
    """
    if interpolation not in ("linear", "nearest", "label"):
        raise InputError(f"interpolation must be 'linear', 'nearest' or 'label', got {interpolation!r}")
    chain = read_transform(Path(transform)) if isinstance(transform, (str, Path)) else transform
    source = read_image(image, "labels" if interpolation == "label" else "image")
    grid, _ = read_grid(reference)
    if inverse:
        chain = DisplacementField(grid, inverse_on(chain, grid)[0])
    return resample(source.volume, chain, grid, interpolation)


def apply_to_file(
    transform: Path,
    image: Path,
    reference: Path,
    output: Path,
    interpolation: Interpolation = "linear",
    inverse: bool = False,
) -> None:
    """:func:`apply_transform` from files to a file, stored as the image is, with the reference's orientation codes.

    Raises:
        InputError: a file that cannot be used.
        OutputError: the output cannot be written.
    """
    check_suffix(output)
    source = read_image(image, "labels" if interpolation == "label" else "image")
    _, header = read_grid(reference)
    moved = apply_transform(transform, source, reference, interpolation, inverse)
    storage = label_storage(source) if interpolation == "label" else source.storage
    with staged_file(output) as path:
        nifti.write(path, moved.data[0], moved.grid, header, storage)
