"""Instance optimisation: a found transform is improved on the pair itself, coarse to fine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.cascade import Prepared, shared_grid
from patchreg.errors import InputError
from patchreg.losses import LNCC, Diffusion, MutualInformation
from patchreg.spatial import Affine, Composite, DisplacementField, Grid, MappedGrid, Transform, deformable_part
from patchreg.spatial.foreground import box_grid
from patchreg.types import Progress

AGREEMENT_WINDOW = 7


@dataclass(frozen=True)
class Refinement:
    """How a pair is optimised.

    Args:
        similarity: ``"lncc"``, or ``"mi"`` for contrasts that are not even locally related.
        window: of LNCC, in voxels of each level.
        spacings_mm: of the levels' lattices, coarse to fine; each is raised to the fixed image's own where finer.
        iterations: of Adam, for every level.
        regularity: weight of the squared gradient of the deformation.
        step_voxels: Adam's step, in voxels of the level's lattice.
        flat: gradient (of the loss, a voxel) below which Adam takes smaller steps: what the images say nothing about is
            left to the regularity.
        affine_spacing_mm: lattice of the affine optimisation.
        affine_iterations: of Adam.
        margin_mm: around the fixed image's content.

    Raises:
        InputError: settings that do not go together.
    """

    similarity: str = "lncc"
    window: int = 7
    spacings_mm: Sequence[float] = (4.0, 2.0)
    iterations: Sequence[int] = (40, 40)
    regularity: float = 0.4
    step_voxels: float = 0.3
    flat: float = 0.1
    affine_spacing_mm: float = 4.0
    affine_iterations: int = 60
    margin_mm: float = 8.0

    def __post_init__(self) -> None:
        if self.similarity not in ("lncc", "mi"):
            raise InputError(f"similarity must be 'lncc' or 'mi', got {self.similarity!r}")
        if len(self.spacings_mm) != len(self.iterations):
            raise InputError("refinement needs one number of iterations for every spacing")

    def loss(self) -> nn.Module:
        """The similarity as a loss."""
        return LNCC(self.window) if self.similarity == "lncc" else MutualInformation()


class _Level:
    """A lattice with the fixed image on it, and the moving image to sample; shared out as the fixed image is."""

    def __init__(self, fixed: Prepared, moving: Prepared, spacing: float, margin: float, device: torch.device) -> None:
        self.grid = fixed.volume.grid.share(box_grid(fixed.content, fixed.volume.grid, margin, spacing))
        self.moving_mask = moving.mask
        self.moving = moving.at(spacing).to(device)
        here = MappedGrid.identity(self.grid)
        self.fixed = here.sample(fixed.at(spacing).to(device))
        self.mask = None if fixed.mask is None else here.sample(fixed.mask.to(device), mode="nearest") > 0

    def weight(self, mapped: MappedGrid) -> Tensor | None:
        """(1, 1, I, J, K): where the similarity counts. None: everywhere."""
        if self.mask is None and self.moving_mask is None:
            return None
        mask = self.mask
        if self.moving_mask is not None:
            with torch.no_grad():
                seen = mapped.sample(self.moving_mask.to(self.fixed.device), mode="nearest") > 0
            mask = seen if mask is None else mask & seen
        assert mask is not None
        return mask if bool(self.grid.largest(mask.any().float())) else None

    def measure(self, loss: nn.Module, mapped: MappedGrid) -> Tensor:
        """The similarity loss of the moving image at mapped points of the lattice."""
        return self.grid.measure(loss, self.fixed, mapped.sample(self.moving), self.weight(mapped))


def refine_affine(
    fixed: Prepared,
    moving: Prepared,
    start: Transform,
    settings: Refinement,
    rigid: bool,
    device: torch.device,
    progress: Progress | None = None,
) -> Affine:
    """An affine or rigid map, applied before ``start``, that makes the images more alike.

    Parameters are a rotation vector, a translation and, unless rigid, the logarithms of stretches and shears about
    the fixed content's centre, scaled so that a unit moves the content's rim by about a voxel of the lattice.

    Returns:
        The best map seen; the identity where nothing was better.
    """
    level = _Level(fixed, moving, settings.affine_spacing_mm, settings.margin_mm, device)
    center = fixed.content.center_mm
    radius = float((fixed.content.high_mm - fixed.content.low_mm).max()) / 2
    parameters = torch.zeros(6 if rigid else 12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([parameters], lr=settings.step_voxels, betas=(0.9, 0.99))
    loss = settings.loss()
    best, least = torch.eye(4, dtype=torch.float64), math.inf
    for step in range(settings.affine_iterations):
        matrix = _matrix(parameters * settings.affine_spacing_mm, radius, center)
        mapped = Composite([Affine(matrix), start]).on(level.grid)
        value = level.measure(loss, mapped)
        if float(value.detach()) < least:
            best, least = matrix.detach(), float(value.detach())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if progress:
            progress("refining the affine map", step + 1, settings.affine_iterations)
    return Affine(shared_grid([fixed, moving]).alike(best))


def _matrix(p: Tensor, radius: float, center: Tensor) -> Tensor:
    """(4, 4) from 6 or 12 parameters in mm at ``radius``."""
    r, zero = p[:3] / radius, torch.zeros((), dtype=p.dtype)
    skew = torch.stack([zero, -r[2], r[1], r[2], zero, -r[0], -r[1], r[0], zero]).view(3, 3)
    linear = torch.matrix_exp(skew)
    if p.numel() == 12:
        s = p[6:] / radius
        symmetric = torch.stack([s[0], s[3], s[4], s[3], s[1], s[5], s[4], s[5], s[2]]).view(3, 3)
        linear = linear @ torch.matrix_exp(symmetric)
    top = torch.cat([linear, (center - linear @ center + p[3:6])[:, None]], dim=1)
    return torch.cat([top, torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=p.dtype)])


class _Correction:
    """A displacement on a grid, given by a smoothed lattice of half as many points along each dimension.

    Args:
        grid: of the displacement; where it is a part, so are the parameters.
        device: of the parameters.

    Attributes:
        parameters: in voxels of the grid, zero at first.
        numbers: how many there are in all.
    """

    def __init__(self, grid: Grid, device: torch.device) -> None:
        i, j, k = (max(2, math.ceil(n / 2)) for n in grid.whole.shape)
        self.grid, self.shape, self.numbers = grid, (i, j, k), 3 * i * j * k
        self.parameters = torch.zeros((1, 3, *grid.part_of(self.shape)), device=device, requires_grad=True)

    def __call__(self) -> Tensor:
        """(1, 3, I, J, K), mm."""
        return self.grid.spacing[0] * self.grid.smooth_upsampled(self.parameters, self.shape, sigma=1.0, truncate=2.0)


def refine_deformable(
    fixed: Prepared,
    moving: Prepared,
    start: Transform,
    settings: Refinement,
    device: torch.device,
    progress: Progress | None = None,
) -> Composite:
    """A displacement that replaces the deformable part of ``start`` by a better one.

    The transform is written ``A (x + u(x))`` with its affine part ``A``. To ``u``, as it is and as fine as it is, every
    level adds a correction on a lattice of world-aligned points, given by a smoothed lattice of twice the spacing and
    optimised by Adam for similarity plus ``regularity`` times the mean squared gradient of their sum in the world.

    Memory: on the device about 20 floats a point of a level's lattice; where the fixed image is, 9 a point of ``u``. Where
    the fixed image is shared out over processes, so is all of that, with the state of Adam.

    References:
        Siebert et al. 2021 (ConvexAdam), arXiv:2112.03053, sec. 2.2, for Adam on a smoothed coarse lattice.
    """
    loss, rough = settings.loss(), Diffusion()
    finest = max(fixed.volume.grid.spacing) * 0.75
    given = [min(t.grid.spacing) for t in Composite([start]).transforms if isinstance(t, DisplacementField)]
    spacing = min(given + [max(s, finest) for s in settings.spacings_mm])
    whole = fixed.volume.grid.share(box_grid(fixed.content, fixed.volume.grid, settings.margin_mm, spacing))
    total, affine = deformable_part(start, whole)
    for number, (wanted, iterations) in enumerate(zip(settings.spacings_mm, settings.iterations, strict=True), start=1):
        level = _Level(fixed, moving, max(wanted, finest), settings.margin_mm, device)
        grid, name = level.grid, f"refining, level {number} of {len(settings.spacings_mm)}"
        u0 = DisplacementField(whole, total).on(grid).total_displacement_mm().to(device)
        correction = _Correction(grid, device)
        optimizer = torch.optim.Adam(
            [correction.parameters], lr=settings.step_voxels, betas=(0.9, 0.99), eps=settings.flat
        )
        for step in range(iterations):
            u = u0 + correction()
            mapped = MappedGrid(grid, torch.eye(4, dtype=torch.float64), u).then_affine(affine.matrix)
            cost = level.measure(loss, mapped) + settings.regularity * grid.measure(rough, u, grid.spacing)
            optimizer.zero_grad()
            (cost * correction.numbers).backward()
            optimizer.step()
            if progress:
                progress(name, step + 1, iterations)
        added = DisplacementField(grid, correction().detach().to(total.device))
        total = total + added.on(whole).total_displacement_mm()
    return Composite([DisplacementField(whole, total), affine])


def contrast_agreement(fixed: Prepared, moving: Prepared, transform: Transform, spacing_mm: float) -> float:
    """Whether bright is bright in both images: from 1 (wherever they are related) to -1 (dark there), 0 for no rule.

    The local correlations ``r`` in windows of 7 lattice points that lie inside both contents, as
    ``sum r |r| / sum r^2``. What lies at the contents' rim would always agree: there is an image on one side only.

    The lattice is whole in every process: of a volume of 1 mm a lattice of 4 mm is a 64th, about ten times.
    """
    level = _Level(fixed, moving, spacing_mm, 0.0, torch.device("cpu"))
    grid = level.grid
    if min(grid.whole.shape) < AGREEMENT_WINDOW:
        return 1.0

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool3d(x, AGREEMENT_WINDOW, stride=AGREEMENT_WINDOW // 2)

    with torch.no_grad():
        images = [grid.gathered(x) for x in (level.fixed, transform.on(grid).sample(level.moving))]
        a, b = images
        covariance = mean(a * b) - mean(a) * mean(b)
        variances = [(mean(x * x) - mean(x).square()).clamp(min=0) for x in images]
        r = covariance / (variances[0] * variances[1] + 1e-5).sqrt()
        inside = torch.stack([mean((x > 0.05).float()) >= 0.9 for x in images]).all(dim=0)
        r = r[inside] if bool(inside.any()) else r
        grid = shared_grid([fixed, moving])
        return float(grid.alike((r * r.abs()).sum() / r.square().sum().clamp(min=1e-12)))


def similarity(
    fixed: Prepared, moving: Prepared, transform: Transform, settings: Refinement, spacing_mm: float
) -> float:
    """How alike the images are through a transform: mean LNCC, or mutual information in nats; larger is better."""
    level = _Level(fixed, moving, spacing_mm, settings.margin_mm, torch.device("cpu"))
    with torch.no_grad():
        found = level.measure(settings.loss(), transform.on(level.grid))
        value = float(shared_grid([fixed, moving]).alike(found))
    return 1 - value if settings.similarity == "lncc" else -value
