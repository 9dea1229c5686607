"""A procedural head: a different one for every seed, and no data needed.

Not an anatomical atlas, but it has what makes brains hard to register: folded cortex whose folds differ between
heads, thin fluid between them, ventricles of different sizes, deep nuclei of low contrast, and a skull around it all.
Labels carry FreeSurfer's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchreg.errors import InputError
from patchreg.ops.windows import gaussian_smooth
from patchreg.spatial import Grid, MappedGrid, Volume

SKULL, SCALP, CSF = 515, 516, 24
MIDLINE = {"third_ventricle": 14, "brainstem": 16}
LEFT = {"wm": 2, "cortex": 3, "ventricle": 4, "cerebellum_wm": 7, "cerebellum": 8, "thalamus": 10, "caudate": 11,
        "putamen": 12, "pallidum": 13, "hippocampus": 17, "amygdala": 18}  # fmt: skip
RIGHT = {"wm": 41, "cortex": 42, "ventricle": 43, "cerebellum_wm": 46, "cerebellum": 47, "thalamus": 49, "caudate": 50,
         "putamen": 51, "pallidum": 52, "hippocampus": 53, "amygdala": 54}  # fmt: skip
BRAIN_LABELS = tuple(sorted({*LEFT.values(), *RIGHT.values(), *MIDLINE.values()}))

# centre (|x|, y, z) and radii in mm of the paired deep structures, drawn in this order, later ones on top
_DEEP = {
    "ventricle": ((9.0, -2.0, 10.0), (5.5, 29.0, 8.0)),
    "thalamus": ((10.0, -17.0, 3.0), (8.0, 13.0, 8.5)),
    "caudate": ((14.0, 13.0, 8.0), (5.0, 14.0, 9.0)),
    "putamen": ((26.0, 4.0, 0.0), (6.0, 16.0, 10.0)),
    "pallidum": ((19.5, -1.0, -1.0), (4.0, 9.0, 7.0)),
    "hippocampus": ((27.0, -20.0, -15.0), (6.5, 19.0, 6.0)),
    "amygdala": ((23.0, 0.0, -18.0), (7.0, 7.5, 7.0)),
}  # fmt: skip


@dataclass(frozen=True)
class _Space:
    """World coordinates seen by the shape functions, after the head's own deformation, and noise to draw with."""

    x: Tensor
    y: Tensor
    z: Tensor
    folds: Tensor
    fine_folds: Tensor

    def ellipsoid(
        self, center: tuple[float, float, float], radii: tuple[float, float, float], mirrored: bool
    ) -> Tensor:
        """About how deep inside the ellipsoid each point is, in mm; negative outside."""
        x = self.x.abs() if mirrored else self.x
        parts = [(p - c) / r for p, c, r in zip((x, self.y, self.z), center, radii, strict=True)]
        distance = (parts[0].square() + parts[1].square() + parts[2].square()).sqrt()
        return (1 - distance) * sum(radii) / 3


def phantom_grid(spacing_mm: float) -> Grid:
    """The lattice of a phantom.

    Raises:
        InputError: a spacing at which nothing could be seen.
    """
    if not 0.25 <= spacing_mm <= 8:
        raise InputError(f"spacing_mm must be from 0.25 to 8, got {spacing_mm}")
    shape = [round(extent / spacing_mm) for extent in (192, 224, 208)]
    return Grid.aligned((0.0, 0.0, -4.0), shape, spacing_mm)


def phantom(seed: int, spacing_mm: float = 2.0) -> Volume:
    """The label map of a head.

    Args:
        seed: which head.
        spacing_mm: of the isotropic voxels, which cover about 192 x 224 x 208 mm.

    Returns:
        (1, I, J, K) int16, in RAS; :data:`BRAIN_LABELS`, fluid, skull and scalp, and 0 around it.

    Raises:
        InputError: a spacing at which nothing could be seen.
    """
    grid = phantom_grid(spacing_mm)
    generator = torch.Generator().manual_seed(seed)
    space = _space(grid, generator)

    def about(value: float, part: float = 0.06) -> float:
        return value * (1 + part * float(torch.randn(1, generator=generator).clamp(-2, 2)))

    def jitter(center: tuple[float, float, float], mm: float = 1.5) -> tuple[float, float, float]:
        a, b, c = (v + mm * float(torch.randn(1, generator=generator).clamp(-2, 2)) for v in center)
        return a, b, c

    left = space.x < 0
    labels = torch.zeros(grid.shape, dtype=torch.int16)

    def paint(where: Tensor, structure: str) -> None:
        labels[where & left], labels[where & ~left] = LEFT[structure], RIGHT[structure]

    size = about(1.0, 0.04)
    head = space.ellipsoid((0, 0, 4), (80 * size, 99 * size, 88 * size), mirrored=False)
    neck = space.ellipsoid((0, -18, -80), (52, 58, 60), mirrored=False)
    hull = space.ellipsoid((0, -2, 8), (about(67, 0.03), about(84, 0.03), about(66, 0.03)), mirrored=False)
    temporal = space.ellipsoid(jitter((42, 4, -22)), (about(21), about(40), about(20)), mirrored=True)
    cerebrum = torch.maximum(torch.minimum(hull, space.z + 16), temporal)
    cerebellum = space.ellipsoid(jitter((18, -58, -34)), (about(30), about(25), about(21)), mirrored=True)
    fissure = torch.where(space.z > -12, space.x.abs() - 1.2, 5.0)  # between the hemispheres

    labels[torch.maximum(head, neck) > 0] = SCALP
    labels[(head > about(7)) & (head < about(12)) & (space.z > -45)] = SKULL
    labels[torch.maximum(cerebrum, cerebellum) > -4] = CSF
    gray, white = (torch.minimum(cerebrum, fissure) - 15 * _sulcus(space.folds, width) for width in (0.12, 0.42))
    inside = gray > 0
    paint(inside, "cortex")
    paint(inside & (white > about(3.0)), "wm")
    little = (cerebellum - 8 * _sulcus(space.fine_folds, 0.1) > 0) & ~inside
    paint(little, "cerebellum")
    paint(little & (cerebellum - 8 * _sulcus(space.fine_folds, 0.6) > 4), "cerebellum_wm")
    stem = space.ellipsoid((0, -24, -38), (about(11), about(11), about(32)), mirrored=False) > 0
    labels[stem & (space.z < -6)] = MIDLINE["brainstem"]

    scale = {"ventricle": 1 + 0.25 * float(torch.randn(1, generator=generator).clamp(-2, 2))}
    for name, (center, radii) in _DEEP.items():
        rx, ry, rz = (about(r, 0.08) * scale.get(name, 1.0) for r in radii)
        paint(space.ellipsoid(jitter(center), (rx, ry, rz), mirrored=True) > 0, name)
    third = space.ellipsoid(jitter((0, -10, 1), 0.5), (about(2.5), about(12), about(8)), mirrored=False)
    labels[third > 0] = MIDLINE["third_ventricle"]
    return Volume(labels[None], grid, f"phantom {seed}")


def _sulcus(folds: Tensor, width: float) -> Tensor:
    """1 in the middle of a sulcus, which runs where the noise crosses zero, falling to 0 over about ``width``."""
    return torch.exp(-(folds / width).square())


def _space(grid: Grid, generator: torch.Generator) -> _Space:
    points = grid.points().float().permute(3, 0, 1, 2)
    step = grid.spacing[0]

    def noise(channels: int, wavelength_mm: float) -> Tensor:
        """Smooth noise of unit variance: made on a lattice of its own, so that a head keeps its shape at any spacing."""
        coarse = Grid.aligned(
            grid.center, [round(n * step / wavelength_mm * 4) + 8 for n in grid.shape], wavelength_mm / 4
        )
        field = gaussian_smooth(torch.randn((1, channels, *coarse.shape), generator=generator), (1.2, 1.2, 1.2))
        return MappedGrid.identity(grid).sample(Volume((field / field.std())[0], coarse), padding="border")[0]

    warp = 3.5 * noise(3, 70.0) + 1.2 * noise(3, 30.0)
    x, y, z = points + warp
    return _Space(x, y, z, noise(1, 29.0)[0], noise(1, 20.0)[0])
