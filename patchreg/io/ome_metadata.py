"""Where an OME-Zarr image lies in the world: the metadata of OME-NGFF 0.4 and 0.5 and a grid.

OME-NGFF orders axes as the array has them, slowest first, usually (t, c, z, y, x), and gives every axis a scale, a
translation and a unit. It knows no world directions and, up to 0.5, no rotation. Here

- the spatial axes reversed are (I, J, K), so that x is I: the fastest axis of either;
- the axis **x becomes R, y becomes A, z becomes S**: coordinates grow to the right, to the front, and up;
- unless the axes say otherwise: ``"orientation": {"type": "anatomical", "value": "right-to-left"}`` (RFC-4) says that this
  axis grows to the left, whatever its name. Rostral and caudal are read as anterior and posterior, dorsal and ventral as
  superior and inferior, as atlases of rodent brains have it;
- the translation is the place of the centre of the first voxel; lengths without a unit are micrometres.

Images that patchreg writes have, beside ``ome``, the attribute

    "patchreg": {"affine": [[...], [...], [...], [...]], "space": "RAS+ mm"}

where ``affine @ (i, j, k, 1)`` is the world point of voxel (i, j, k) of the first level. It holds what OME-NGFF cannot, an
oblique grid, and is taken for the truth as long as its voxel sizes are those that OME-NGFF states.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patchreg.errors import GeometryError, InputError
from patchreg.spatial import Grid

log = logging.getLogger(__name__)

VERSIONS = ("0.4", "0.5")

MILLIMETRES = {
    "angstrom": 1e-7, "nanometer": 1e-6, "micrometer": 1e-3, "millimeter": 1.0, "centimeter": 10.0, "decimeter": 100.0,
    "meter": 1e3, "inch": 25.4,
}  # fmt: skip

NAMES = {"x": 0, "y": 1, "z": 2}

ORIENTATIONS = {
    "left-to-right": (0, 1.0), "right-to-left": (0, -1.0),
    "posterior-to-anterior": (1, 1.0), "anterior-to-posterior": (1, -1.0),
    "caudal-to-rostral": (1, 1.0), "rostral-to-caudal": (1, -1.0),
    "inferior-to-superior": (2, 1.0), "superior-to-inferior": (2, -1.0),
    "ventral-to-dorsal": (2, 1.0), "dorsal-to-ventral": (2, -1.0),
}  # fmt: skip
"""Which world coordinate an axis runs along, and whether with it or against it."""

LETTERS = {
    "R": "left-to-right", "L": "right-to-left", "A": "posterior-to-anterior", "P": "anterior-to-posterior",
    "S": "inferior-to-superior", "I": "superior-to-inferior",
}  # fmt: skip


@dataclass(frozen=True)
class Multiscale:
    """One image at several resolutions.

    Args:
        name: of the file, for messages.
        axes: of its arrays, as OME-NGFF describes them.
        datasets: a level each: its path and its transformations.
        transformations: of all levels, after their own.
        affine: what patchreg noted of the first level, (4, 4) RAS+ mm.
    """

    name: str
    axes: list[dict[str, Any]]
    datasets: list[dict[str, Any]]
    transformations: list[dict[str, Any]]
    affine: Any = None

    @classmethod
    def of(cls, attributes: dict[str, Any], name: str) -> Multiscale:
        """Find the image in a group's attributes.

        Raises:
            InputError: no image, several images, or metadata of another version.
        """
        ome = attributes.get("ome", attributes)
        if not ome.get("multiscales"):
            inside = "plate" in ome or "bioformats2raw.layout" in ome
            remedy = f"it holds several images: give one of them, such as {name}/0" if inside else "is it an OME-Zarr?"
            raise InputError(f"{name}: has no OME-NGFF image at its top ('multiscales' is missing); {remedy}")
        if len(ome["multiscales"]) > 1:
            log.warning("%s: has %d images; the first is read", name, len(ome["multiscales"]))
        found = ome["multiscales"][0]
        version = str(ome.get("version", found.get("version", "0.4")))
        axes = found.get("axes")
        if not version.startswith(VERSIONS) or not axes or not all(isinstance(axis, dict) for axis in axes):
            raise InputError(
                f"{name}: OME-NGFF of version {version}; versions {' and '.join(VERSIONS)} are read: convert it, for "
                "example with ngff-zarr"
            )
        noted = attributes.get("patchreg")
        affine = noted.get("affine") if isinstance(noted, dict) else None
        return cls(name, axes, found.get("datasets", []), found.get("coordinateTransformations", []), affine)

    @property
    def space(self) -> tuple[int, int, int]:
        """The array's dimensions that are I, J and K.

        Raises:
            InputError: not three spatial axes, or axes of another type.
        """
        types = [axis.get("type") for axis in self.axes]
        space = [d for d, kind in enumerate(types) if kind == "space"]
        if (
            len(space) != 3
            or set(types) - {"space", "time", "channel"}
            or max(map(types.count, ("time", "channel"))) > 1
        ):
            names = ", ".join(f"{axis.get('name')} ({axis.get('type')})" for axis in self.axes)
            raise InputError(
                f"{self.name}: has axes {names}; give an image of three spatial axes, and channels at most"
            )
        k, j, i = space
        return i, j, k

    def find(self, kind: str) -> int | None:
        """The array's dimension of type ``"channel"`` or ``"time"``."""
        return next((d for d, axis in enumerate(self.axes) if axis.get("type") == kind), None)

    def path(self, level: int) -> str:
        """Of the array of a level within the group.

        Raises:
            InputError: no such level.
        """
        if not 0 <= level < len(self.datasets):
            raise InputError(
                f"{self.name}: has {len(self.datasets)} levels, 0 to {len(self.datasets) - 1}; got {level}"
            )
        return str(self.datasets[level]["path"])

    def grid(self, level: int, shape: tuple[int, ...]) -> Grid:
        """Where the voxels of a level lie.

        Args:
            level: 0 is the finest.
            shape: of its array.

        Raises:
            InputError: axes, units or transformations that say no place.
            GeometryError: an affine that is singular or not finite.
        """
        directions = self._directions()
        scale, translation = self._lengths(level)
        affine = np.eye(4)
        affine[:3, :3] = directions * scale
        affine[:3, 3] = directions @ translation
        if self.affine is not None:
            affine = self._noted(affine, level)
        try:
            return Grid([shape[d] for d in self.space], affine)
        except GeometryError as error:
            raise GeometryError(f"{self.name}: {error}") from error

    def _noted(self, stated: np.ndarray, level: int) -> np.ndarray:
        """The affine by the one that was noted, unless OME-NGFF has been changed since."""
        first = np.asarray(self.affine, dtype=np.float64)
        scale, translation = self._lengths(0)
        fits = first.shape == (4, 4) and np.allclose(np.linalg.norm(first[:3, :3], axis=0), np.abs(scale), rtol=1e-3)
        if not fits:
            log.warning("%s: its affine has other voxel sizes than OME-NGFF states; OME-NGFF is followed", self.name)
            return stated
        if level == 0:
            return first
        own_scale, own_translation = self._lengths(level)
        step = np.eye(4)
        step[:3, :3] = np.diag(own_scale / scale)
        step[:3, 3] = (own_translation - translation) / scale
        return first @ step

    def _directions(self) -> np.ndarray:
        """(3, 3): world unit vectors of I, J, K (columns)."""
        directions = np.zeros((3, 3))
        axes = [self.axes[d] for d in self.space]
        oriented = ["orientation" in axis for axis in axes]
        for column, axis in enumerate(axes):
            if any(oriented):
                value = (axis.get("orientation") or {}).get("value")
                world, sign = ORIENTATIONS.get(str(value), (None, 0.0))
            else:
                world, sign = NAMES.get(str(axis.get("name")).lower()), 1.0
            if world is not None:
                directions[world, column] = sign
        if abs(np.linalg.det(directions)) != 1:
            said = ", ".join(str(axis.get("orientation", {}).get("value", axis.get("name"))) for axis in axes[::-1])
            raise InputError(
                f"{self.name}: its spatial axes ({said}) do not say three world directions; name them z, y, x, or give "
                "all three an orientation such as 'left-to-right'"
            )
        return directions

    def _lengths(self, level: int) -> tuple[np.ndarray, np.ndarray]:
        """Scale and translation along I, J, K in mm."""
        scale, translation = np.ones(len(self.axes)), np.zeros(len(self.axes))
        for step in [*self.datasets[level].get("coordinateTransformations", []), *self.transformations]:
            kind = step.get("type")
            if kind == "identity":
                continue
            values = np.asarray(step.get(kind, np.nan)) if kind in ("scale", "translation") else np.empty(0)
            if values.shape != scale.shape or values.dtype.kind not in "iuf":
                raise InputError(
                    f"{self.name}: a transformation of type {kind!r} cannot be used; each needs a 'scale' or a "
                    f"'translation' of {len(self.axes)} numbers, in its metadata"
                )
            if kind == "scale":
                scale, translation = scale * values, translation * values
            else:
                translation = translation + values
        units = np.array([self._millimetres(self.axes[d]) for d in self.space])
        index = list(self.space)
        return scale[index] * units, translation[index] * units

    def _millimetres(self, axis: dict[str, Any]) -> float:
        unit = axis.get("unit")
        if unit is None:
            log.warning("%s: axis %s has no unit; it is taken for micrometres", self.name, axis.get("name"))
            unit = "micrometer"
        if unit not in MILLIMETRES:
            raise InputError(
                f"{self.name}: axis {axis.get('name')} is in {unit!r}; give it one of {', '.join(MILLIMETRES)}"
            )
        return MILLIMETRES[unit]


def attributes_of(grid: Grid, channels: int, target: Path) -> dict[str, Any]:
    """The attributes of a group that holds one image of one level, at the path ``0``, as OME-NGFF 0.5 has them.

    A grid that is not along the world's axes is described as if it were, with the nearest directions, which is warned
    about; the affine is noted beside.

    Args:
        grid: of the image.
        channels: of the image; the array is (z, y, x) for one, (c, z, y, x) for more.
        target: path of the group, whose name is the image's.
    """
    affine = grid.affine.numpy()
    along = [ORIENTATIONS[LETTERS[letter]] for letter in grid.orientation]
    off_axis = grid.direction.abs().numpy().copy()
    for dim, (world, _) in enumerate(along):
        off_axis[world, dim] = 0
    if off_axis.max() > 1e-4:
        log.warning(
            "%s: OME-NGFF cannot hold a rotation: other software will show the image along the axes %s; patchreg reads "
            "the whole affine from the attribute 'patchreg'", target, grid.orientation
        )  # fmt: skip
    axes: list[dict[str, Any]] = [
        {
            "name": n,
            "type": "space",
            "unit": "millimeter",
            "orientation": {"type": "anatomical", "value": LETTERS[letter]},
        }
        for n, letter in zip("zyx", grid.orientation[::-1], strict=True)
    ]
    scale, translation = list(grid.spacing[::-1]), [sign * float(affine[world, 3]) for world, sign in along[::-1]]
    if channels > 1:
        axes, scale, translation = [{"name": "c", "type": "channel"}, *axes], [1.0, *scale], [0.0, *translation]
    steps = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": translation}]
    name = target.name.removesuffix(".zarr").removesuffix(".ome")
    image = {"name": name, "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}]}
    noted = {"affine": affine.tolist(), "space": "RAS+ mm"}
    return {"ome": {"version": "0.5", "multiscales": [image]}, "patchreg": noted}
