"""Numerical inverse of a transform."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from patchreg.spatial.grid import Grid
from patchreg.spatial.linear import apply_linear
from patchreg.spatial.mapped import MappedGrid
from patchreg.spatial.transforms import Affine, Composite, DisplacementField, Transform

log = logging.getLogger(__name__)

AT_ONCE = 2**22
"""Voxels that are solved together."""

FEW = 0.2
"""Share of unsolved points from which on they are solved by themselves, and not with all the others."""


@dataclass(frozen=True)
class Inversion:
    """The inverse of a transform on a grid, and how well it inverts.

    Args:
        displacement_mm: ``T^-1(y) - y`` at the points ``y`` of the grid, (1, 3, I, J, K), affine part included.
        residual_mean_mm: mean over the grid of ``|T(T^-1(y)) - y|``.
        residual_max_mm: its maximum.
        iterations: fixed-point iterations run.
    """

    displacement_mm: Tensor
    residual_mean_mm: float
    residual_max_mm: float
    iterations: int


def invert(
    transform: Transform, grid: Grid, tolerance_mm: float = 1e-2, iterations: int = 60, coarse_mm: float = 3.0
) -> Inversion:
    """Find ``x`` with ``T(x) = y`` for every point ``y`` of ``grid``.

    With ``A`` the affine part of ``T``, ``x <- x + A^-1 (y - T(x))`` from ``x = A^-1 y``; it converges where the
    deformable part is a contraction, and a point that a step made worse takes half that step next. A fine grid starts
    from the solution on a coarse one, and is solved slab by slab.

    Args:
        transform: ``T``.
        grid: the points ``y``; of a part of a larger one all who hold parts must call this.
        tolerance_mm: stop when at most one residual in ten thousand is larger.
        iterations: stop after this many.
        coarse_mm: spacing of the coarse grid; grids not much finer are solved at once.

    Returns:
        The inverse displacement with its residuals. A residual above the tolerance is logged, not hidden: a folded
        transform has no inverse there.

    References:
        Chen et al. 2008, doi:10.1118/1.2816107, eq. (5), with the affine part as preconditioner.
    """
    affine = transform if isinstance(transform, Affine) else Composite([transform]).affine_part()
    back = affine.inverse().matrix.detach()
    coarse = grid.share(grid.whole.with_spacing([max(s, coarse_mm) for s in grid.spacing]))
    first: DisplacementField | None = None
    if coarse.whole.voxels * 4 < grid.whole.voxels:
        zero = torch.zeros((1, 3, *coarse.shape))
        first = DisplacementField(coarse, _iterate(transform, back, coarse, zero, tolerance_mm, iterations)[0])
    total = torch.empty((1, 3, *grid.shape))
    mean, worst, most = 0.0, 0.0, 0
    for where, slab in grid.slabs(AT_ONCE):
        start = torch.zeros((1, 3, *slab.shape)) if first is None else first.resampled(slab).displacement_mm
        best, its_mean, its_worst, done = _iterate(transform, back, slab, start, tolerance_mm, iterations)
        total[:, :, *where] = MappedGrid(slab, back, best).total_displacement_mm()
        mean += its_mean * slab.whole.voxels / grid.whole.voxels
        worst, most = max(worst, its_worst), max(most, done)
    if worst > tolerance_mm:
        log.info("inverse: residual %.3g mm mean, %.3g mm at worst after %d iterations", mean, worst, most)
    return Inversion(total, mean, worst, most)


@torch.no_grad()
def _iterate(
    transform: Transform, back: Tensor, grid: Grid, start: Tensor, tolerance_mm: float, iterations: int
) -> tuple[Tensor, float, float, int]:
    """The best ``e`` with ``x = A^-1 y + e(y)``, its mean and largest residual in mm, and the iterations run."""
    e, best = start, start
    step, least = torch.ones((1, 1, *grid.shape)), torch.full((1, 1, *grid.shape), torch.inf)
    mean, done, stalled = float("inf"), 0, 0
    while done < iterations:
        done += 1
        residual = transform.map(MappedGrid(grid, back, e)).total_displacement_mm().neg_()  # y - T(x)
        size = residual.norm(dim=1, keepdim=True)
        better = size < least
        best = torch.where(better, e, best)
        step = torch.where(better, (step * 1.2).clamp(max=1.0), step * 0.5)
        least = torch.minimum(size, least)
        before, mean = mean, _mean(least, grid)
        stalled = stalled + 1 if mean > 0.98 * before else 0
        unsolved = least[0, 0] > tolerance_mm
        share = _mean(unsolved, grid)
        if stalled == 3 or share <= 1e-4:
            break
        if share < FEW and not grid.is_part:  # the points of one process may lie anywhere in what others hold
            x, size, done = _solve_points(transform, back, grid, best, unsolved, tolerance_mm, done, iterations)
            best, least = best.clone(), least.clone()
            best[0][:, unsolved], least[0, 0][unsolved] = x, size
            mean = _mean(least, grid)
            break
        e = e + apply_linear(back[:3, :3], step * residual)
    return best, mean, float(grid.largest(least.max())), done


def _mean(values: Tensor, grid: Grid) -> float:
    """Over all of the grid, whoever holds it."""
    return float(grid.add_up(values.sum(dtype=torch.float64))) / grid.whole.voxels


def _solve_points(
    transform: Transform,
    back: Tensor,
    grid: Grid,
    start: Tensor,
    chosen: Tensor,
    tolerance_mm: float,
    done: int,
    iterations: int,
) -> tuple[Tensor, Tensor, int]:
    """The same iteration for a few points of the grid alone: ``e`` (3, N), residuals (N,), and the iterations run."""
    y = grid.to_world(chosen.nonzero())
    linear, offset = back[:3, :3], back[:3, 3]
    origin = y @ linear.T + offset
    e = best = start[0][:, chosen].T.double()
    step, least = torch.ones((len(y), 1), dtype=y.dtype), torch.full((len(y), 1), torch.inf, dtype=y.dtype)
    enough = 1e-4 * chosen.numel()
    mean, stalled = float("inf"), 0
    while done < iterations:
        done += 1
        residual = y - transform(origin + e)
        size = residual.square().sum(dim=1, keepdim=True).sqrt()
        better = size < least
        best = torch.where(better, e, best)
        step = torch.where(better, (step * 1.2).clamp(max=1.0), step * 0.5)
        least = torch.minimum(size, least)
        before, mean = mean, float(least.mean())
        stalled = stalled + 1 if mean > 0.98 * before else 0
        if stalled == 3 or int((least > tolerance_mm).sum()) <= enough:
            break
        e = e + (step * residual) @ linear.T
    return best.T.float(), least[:, 0].float(), done


def inverse_field(transform: Transform, grid: Grid) -> tuple[DisplacementField, Inversion]:
    """The inverse of ``transform`` as a displacement field on ``grid``, with its residuals."""
    found = invert(transform, grid)
    return DisplacementField(grid, found.displacement_mm), found
