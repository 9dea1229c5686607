"""What a grid does that differs where it is a part of a larger one, held by one of several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg import ops
from patchreg.ops.windows import gaussian_smooth
from patchreg.spatial.pooling import Blocks
from patchreg.types import Interpolation, Padding, Shape3

if TYPE_CHECKING:
    from patchreg.spatial.grid import Grid

Box: TypeAlias = tuple[slice, slice, slice]
"""Voxels of a lattice (I, J, K)."""


class Held:
    """A grid that one process holds all of.

    The other kind is :class:`patchreg.distributed.slab.Slab`, which is a grid, too: that of the rank's own slab. Everything
    that is done voxel by voxel in world coordinates is the same for both. Here is the rest, so that cascade and training
    need not know which they have.
    """

    @property
    def whole(self) -> Grid:
        """The whole grid that this one is a part of."""
        return self  # type: ignore[return-value]

    @property
    def is_part(self) -> bool:
        """Whether others hold the rest."""
        return False

    def local(self, voxel: Shape3) -> Shape3:
        """Where a voxel of the whole grid is on this one; it may lie outside."""
        return voxel

    def share(self, grid: Grid) -> Grid:
        """The part of another whole grid that this process shall hold, shared out as this one is."""
        return grid

    def scope(self) -> AbstractContextManager[object]:
        """Entered around a network whose inputs lie on this grid."""
        return nullcontext()

    def measure(self, loss: Callable[..., Tensor], *values: Any) -> Tensor:
        """A loss of what lies on this grid, and on the rest of it."""
        return loss(*values)

    def add_up(self, part: Tensor) -> Tensor:
        """The sum of what every process has found; no gradient passes."""
        return part

    def largest(self, part: Tensor) -> Tensor:
        """The largest of what every process has found, element by element; no gradient passes."""
        return part

    def alike(self, found: Tensor) -> Tensor:
        """What every process has found for itself, exactly the same in all: that of the first. No gradient passes.

        A GPU may round the same computation otherwise than its neighbour. What decisions are made upon, and what says
        where patches lie, must not differ.
        """
        return found

    def gathered(self, data: Tensor) -> Tensor:
        """All of a tensor of which this process holds the part on this grid: (C, I, J, K) or (B, C, I, J, K)."""
        return data

    def of_all(self, x: Tensor) -> Tensor:
        """The same number in every process, computed by each: gradients that pass are shared out among them."""
        return x

    def for_part(self, x: Tensor) -> Tensor:
        """The same number in every process, about to be used on its part: gradients that pass are added up over all."""
        return x

    def integrate(self, velocity: Tensor) -> Tensor:
        """The displacement of a stationary velocity (B, 3, I, J, K), in voxels; see :func:`patchreg.ops.integrate`."""
        return ops.integrate(velocity)

    def read(
        self,
        image: Tensor,
        onto: Grid,
        matrix: Tensor,
        displacement_mm: Tensor | None = None,
        mode: Interpolation = "linear",
        padding: Padding = "zeros",
    ) -> Tensor:
        """An image on this grid at the points ``y(x) = A x + d(x)`` of another.

        Args:
            image: (1, C, I, J, K).
            onto: the points ``x``.
            matrix: ``A``, (4, 4), world to world, float64.
            displacement_mm: ``d``, (1, 3, i, j, k), world mm. None: zero.
            mode: see :func:`patchreg.ops.warp`.
            padding: likewise.

        Returns:
            (1, C, i, j, k), on the image's device.
        """
        affine, scale = index_map(onto, onto.for_part(matrix.to(image.device)), self.whole)
        return ops.warp(
            onto.for_part(image),
            None if displacement_mm is None else displacement_mm.to(image.device),
            affine.to(image.device),
            scale.to(image.device),
            shape=None if displacement_mm is not None else onto.shape,
            mode=mode,
            padding=padding,
        )

    def pool(self, data: Tensor, factors: Shape3) -> tuple[Tensor, Grid]:
        """Means of (C, I, J, K) over blocks of ``factors`` voxels, each at most the grid's, and the blocks' centres."""
        grid = self.whole
        x, padding = data[None], [0, 0, 0]
        blocks = [Blocks(n, f) for n, f in zip(grid.shape, factors, strict=True)]
        for dim, block in enumerate(blocks, start=2):
            if block.paired:
                x = (x.narrow(dim, 0, block.items) + x.narrow(dim, 1, block.items)) / 2
            cut, padding[dim - 2] = max(0, block.first), max(0, -block.first)
            x = x.narrow(dim, cut, block.items - 2 * cut)
        pooled = mean_of_blocks(x, factors, padding)
        return pooled, grid.subsampled(factors, [block.start for block in blocks], pooled.shape[1:])

    def thin(self, data: Tensor, factors: Shape3) -> tuple[Tensor, Grid]:
        """Every n-th voxel of (C, I, J, K) along each dimension, from the middle of each block, and their place."""
        start = [(f - 1) // 2 if n >= f else (n - 1) // 2 for f, n in zip(factors, self.whole.shape, strict=True)]
        i, j, k = (slice(s, None, f) for s, f in zip(start, factors, strict=True))
        thinned = data[:, i, j, k].contiguous()
        return thinned, self.whole.subsampled(factors, start, thinned.shape[1:])

    def slabs(self, voxels: int) -> Iterator[tuple[Box, Grid]]:
        """Cut into slabs of at most ``voxels`` voxels (at least one layer): where each lies on this grid, and its grid."""
        grid = self.whole
        layers = max(1, voxels // max(1, grid.shape[1] * grid.shape[2]))
        for start in range(0, grid.shape[0], layers):
            stop = min(start + layers, grid.shape[0])
            where = (slice(start, stop), slice(None), slice(None))
            yield where, grid.crop((start, 0, 0), (stop - start, *grid.shape[1:]))

    def with_neighbours(self, data: Tensor) -> tuple[Tensor, int, int]:
        """(B, C, I, J, K) with a plane of what others hold on either side, as far as there is one; the dimension along
        which they lie, and how many come before this grid's own."""
        return data, 2, 0

    def part_of(self, shape: Shape3) -> Shape3:
        """The voxels that this process holds of a lattice of another shape over the same box."""
        return shape

    def smooth_upsampled(self, coarse: Tensor, shape: Shape3, sigma: float, truncate: float) -> Tensor:
        """Another lattice over the same box, smoothed, and interpolated linearly at the points of this one.

        Args:
            coarse: (B, C, i, j, k); where this grid is a part, what :meth:`part_of` says of it.
            shape: of the whole other lattice.
            sigma: of the Gaussian, in its voxels.
            truncate: sigmas after which it ends.

        Returns:
            (B, C, I, J, K).
        """
        smooth = gaussian_smooth(coarse, (sigma,) * 3, truncate)
        return F.interpolate(smooth, size=self.whole.shape, mode="trilinear", align_corners=False)

    def strided(self, step: int, start: Shape3) -> tuple[tuple[slice, slice, slice], Grid]:
        """Which voxels are every ``step``-th along each dimension, from the whole grid's voxel ``start``; their grid."""
        grid = self.whole
        i, j, k = (slice(s, None, step) for s in start)
        shape = [len(range(s, n, step)) for s, n in zip(start, grid.shape, strict=True)]
        return (i, j, k), grid.subsampled((step,) * 3, start, shape)


def mean_of_blocks(x: Tensor, factors: Shape3, padding: list[int]) -> Tensor:
    """Means of (1, C, I, J, K) over blocks; (C, i, j, k)."""
    return F.avg_pool3d(x, factors, padding=padding, count_include_pad=False, ceil_mode=True)[0]


def index_map(onto: Grid, matrix: Tensor, target: Grid) -> tuple[Tensor, Tensor]:
    """``[A | t]`` (3, 4) from voxels of ``onto``, and ``S`` (3, 3) from mm, to voxels of ``target``."""
    inverse, affine = (m.to(matrix.device) for m in (torch.linalg.inv(target.affine), onto.affine))
    return (inverse @ matrix @ affine)[:3], inverse[:3, :3]
