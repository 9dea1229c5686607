"""A rank's part of a volume in the world: a grid that knows the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patchreg.distributed import communication as comm
from patchreg.distributed.fields import integrate
from patchreg.distributed.halo import exchange_halo
from patchreg.distributed.layout import COARSEST, Layout
from patchreg.distributed.losses.measured import measured
from patchreg.distributed.partition import Partition, Span
from patchreg.distributed.sampler import warp
from patchreg.distributed.sampling import along
from patchreg.distributed.scope import Scope
from patchreg.distributed.shards import gather, scatter, share
from patchreg.distributed.upsampling import smooth_upsampled
from patchreg.errors import InputError
from patchreg.networks.surroundings import surrounded
from patchreg.spatial import Grid, Volume
from patchreg.spatial.held import Box, index_map
from patchreg.spatial.pooling import Blocks
from patchreg.types import Interpolation, Padding, Shape3

BLOCK = 32
"""Planes on whose multiples an image is cut at best, so that networks that halve it five times find it cut alike."""


class Slab(Grid):
    """The grid of this rank's planes of a whole grid.

    As a grid it is that of the slab: patches, points and transforms that work voxel by voxel in world coordinates need no
    more. What looks beyond the slab (sampling an image that lies on it, means over blocks, networks, losses) is done here
    together with the other ranks, who must do the same.

    Args:
        whole: the grid of the whole volume.
        partition: who holds which planes; every rank at least one.
        group: the ranks.

    Raises:
        InputError: a partition of another number of planes or ranks, or with nothing for a rank.
    """

    def __init__(self, whole: Grid, partition: Partition, group: dist.ProcessGroup) -> None:
        axis, rank = partition.dim - 2, comm.rank_in(group)
        if partition.total != whole.shape[axis] or partition.ranks != comm.size_of(group):
            raise InputError(
                f"the partition {partition} is not of {whole.shape[axis]} planes over {comm.size_of(group)} ranks"
            )
        if min(partition.sizes) < 1:
            raise InputError(f"every rank must hold a plane, got {partition.sizes}")
        start, shape = [0.0, 0.0, 0.0], list(whole.shape)
        start[axis], shape[axis] = float(partition.starts[rank]), partition.sizes[rank]
        local = whole.crop(start, shape)
        super().__init__(local.shape, local.affine)
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "partition", partition)
        object.__setattr__(self, "group", group)

    partition: Partition
    group: dist.ProcessGroup
    _whole: Grid

    @classmethod
    def of(cls, whole: Grid, group: dist.ProcessGroup, dim: int | None = None, along: Tensor | None = None) -> Grid:
        """The slab of this rank, or the whole grid where it is too thin to be shared out.

        Args:
            whole: the grid.
            group: the ranks.
            dim: 2, 3 or 4. None: as ``along`` says.
            along: (3,), a direction in the world: the dimension that runs that way most nearly. None, or where that one is too
                thin: the one with most voxels, of equals the first.
        """
        if dim is None and along is not None:
            dim = 2 + int((whole.direction.T @ along).abs().argmax())
            dim = None if partition_of(whole.shape, comm.size_of(group), dim) is None else dim
        found = partition_of(whole.shape, comm.size_of(group), dim)
        return whole if found is None else cls(whole, found, group)

    @property
    def across(self) -> Tensor:
        """(3,): the direction in the world along which the volume is cut, of unit length."""
        return self.whole.direction[:, self.partition.dim - 2]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slab) and self.partition == other.partition and self.whole == other.whole

    def __hash__(self) -> int:
        return hash((self.partition, self.whole))

    def __repr__(self) -> str:
        return f"Slab({self.partition.bounds(self.rank)} along {'IJK'[self.partition.dim - 2]} of {self.whole})"

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return comm.rank_in(self.group)

    @property
    def whole(self) -> Grid:
        return self._whole

    @property
    def is_part(self) -> bool:
        return True

    def crop(self, start: Any, shape: Any) -> Grid:
        if tuple(start) == (0, 0, 0) and tuple(shape) == self.shape:
            return self
        raise InputError("a slab cannot be cropped: crop the whole grid, and share that out")

    def subsampled(self, factors: Any, start: Any, shape: Any) -> Grid:
        raise InputError("a slab cannot be subsampled: take Slab.strided, or the whole grid")

    def local(self, voxel: Shape3) -> Shape3:
        found = list(voxel)
        found[self.partition.dim - 2] -= self.partition.starts[self.rank]
        return found[0], found[1], found[2]

    def share(self, grid: Grid) -> Grid:
        return Slab.of(grid.whole, self.group, along=self.across)

    def scope(self) -> AbstractContextManager[object]:
        return surrounded(Scope(Layout(self.partition), self.group))

    def measure(self, loss: Callable[..., Tensor], *values: Any) -> Tensor:
        return measured(loss, self.partition, self.group, *values)

    def add_up(self, part: Tensor) -> Tensor:
        return comm.reduce_all(part.detach().to(self._messages(part), copy=True), "sum", self.group).to(part.device)

    def largest(self, part: Tensor) -> Tensor:
        return comm.reduce_all(part.detach().to(self._messages(part), copy=True), "max", self.group).to(part.device)

    def alike(self, found: Tensor) -> Tensor:
        return self.add_up(found if self.rank == 0 else torch.zeros_like(found))

    def gathered(self, data: Tensor) -> Tensor:
        if data.ndim == 4:
            return gather(data[None], self.partition, self.group)[0]
        return gather(data, self.partition, self.group)

    def of_all(self, x: Tensor) -> Tensor:
        found: Tensor = _ShareOut.apply(x, self.partition.ranks)
        return found

    def for_part(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        return share(x.to(self._messages(x)), self.group).to(x.device)

    def _messages(self, x: Tensor) -> torch.device:
        """Where a tensor must be to be sent: matrices live on the host, where NCCL sends nothing."""
        return comm.control_device(self.group) if x.device.type == "cpu" else x.device

    def integrate(self, velocity: Tensor) -> Tensor:
        return integrate(velocity, self.partition, group=self.group)

    def read(
        self,
        image: Tensor,
        onto: Grid,
        matrix: Tensor,
        displacement_mm: Tensor | None = None,
        mode: Interpolation = "linear",
        padding: Padding = "zeros",
    ) -> Tensor:
        affine, scale = (m.to(image.device) for m in index_map(onto.whole, matrix, self.whole))
        u = None if displacement_mm is None else displacement_mm.to(image.device)
        partition, dim = self.partition, self.partition.dim
        if isinstance(onto, Slab):
            output = onto.partition
            if output.dim != dim:
                image, partition, affine, scale = along(output.dim, image, partition, affine, scale)
            shape = None if u is not None else onto.whole.shape
            return warp(image, partition, u, affine, scale, shape, output, self.group, mode, padding)
        output = Partition.even(onto.shape[dim - 2], partition.ranks, dim)  # every rank wants all: each makes a part
        part = None if u is None else scatter(u, output, self.group)
        shape = None if u is not None else onto.shape
        return gather(
            warp(image, partition, part, affine, scale, shape, output, self.group, mode, padding), output, self.group
        )

    def pool(self, data: Tensor, factors: Shape3) -> tuple[Tensor, Grid]:
        dim, whole = self.partition.dim, self.whole
        blocks = [Blocks(n, f) for n, f in zip(whole.shape, factors, strict=True)]
        own, x = blocks[dim - 2], data[None]
        for other, block in enumerate(blocks, start=2):
            x = x if other == dim else block.mean(x, other)
        made = Layout(self.partition).shares(own.count)
        x = self._fetch(x, [own.reads(low, high) if low < high else None for low, high in made.spans])
        if made.sizes[self.rank]:
            x = own.mean(x, dim, *made.bounds(self.rank))
        return self._held(x, made, whole.subsampled(factors, [b.start for b in blocks], [b.count for b in blocks]))

    def thin(self, data: Tensor, factors: Shape3) -> tuple[Tensor, Grid]:
        whole, axis = self.whole, self.partition.dim - 2
        start = [(f - 1) // 2 if n >= f else (n - 1) // 2 for f, n in zip(factors, whole.shape, strict=True)]
        shape = [len(range(s, n, f)) for s, n, f in zip(start, whole.shape, factors, strict=True)]
        each = [slice(s, None, f) for s, f in zip(start, factors, strict=True)]
        each[axis] = slice(None)
        made, first, step = Layout(self.partition).shares(shape[axis]), start[axis], factors[axis]
        spans = [(first + step * a, first + step * (b - 1) + 1) if a < b else None for a, b in made.spans]
        x = self._fetch(data[(slice(None), *each)][None], spans)
        each = [slice(None)] * 3
        each[axis] = slice(None, None, step)
        return self._held(x[(slice(None), slice(None), *each)], made, whole.subsampled(factors, start, shape))

    def slabs(self, voxels: int) -> Iterator[tuple[Box, Grid]]:
        """As for any grid, cut across the dimension that is shared out: all ranks have a part of each, as large for all."""
        whole, own = self.whole, self.partition.dim - 2
        axis = max((a for a in range(3) if a != own), key=whole.shape.__getitem__)
        layer = max(self.partition.sizes) * whole.voxels // (whole.shape[own] * whole.shape[axis])
        layers = max(1, voxels // layer)
        for first in range(0, whole.shape[axis], layers):
            start, shape, where = [0, 0, 0], list(whole.shape), [slice(None)] * 3
            start[axis], shape[axis] = first, min(layers, whole.shape[axis] - first)
            where[axis] = slice(first, first + shape[axis])
            i, j, k = where
            yield (i, j, k), Slab(whole.crop(start, shape), self.partition, self.group)

    def with_neighbours(self, data: Tensor) -> tuple[Tensor, int, int]:
        around = exchange_halo(data, self.partition, (1, 1), self.group, "nothing")
        return around, self.partition.dim, min(1, self.partition.starts[self.rank])

    def part_of(self, shape: Shape3) -> Shape3:
        axis, found = self.partition.dim - 2, list(shape)
        partition = Layout(self.partition).of(shape[axis])
        found[axis] = shape[axis] if partition is None else partition.sizes[self.rank]
        return found[0], found[1], found[2]

    def smooth_upsampled(self, coarse: Tensor, shape: Shape3, sigma: float, truncate: float) -> Tensor:
        return smooth_upsampled(coarse, shape, self.whole.shape, self.partition, self.group, sigma, truncate)

    def strided(self, step: int, start: Shape3) -> tuple[tuple[slice, slice, slice], Grid]:
        axis, cuts = self.partition.dim - 2, []
        for low, high in self.partition.spans:
            first = start[axis] + step * max(0, -(-(low - start[axis]) // step))
            cuts.append((first, len(range(first, high, step))))
        if min(count for _, count in cuts) < 1:
            raise InputError(
                f"every {step}th plane leaves a rank none of the slabs {self.partition.sizes}: take a smaller overlap_stride, or "
                "fewer ranks"
            )
        shape = [len(range(s, n, step)) for s, n in zip(start, self.whole.shape, strict=True)]
        whole = self.whole.subsampled((step,) * 3, start, shape)
        local = list(start)
        local[axis] = cuts[self.rank][0] - self.partition.starts[self.rank]
        i, j, k = (slice(s, None, step) for s in local)
        partition = Partition(tuple(count for _, count in cuts), self.partition.dim)
        return (i, j, k), Slab(whole, partition, self.group)

    def _held(self, x: Tensor, made: Partition, whole: Grid) -> tuple[Tensor, Grid]:
        """What every rank has made of another grid over the same box (1, C, ...): a slab, or all where planes are too few."""
        if Layout(self.partition).of(made.total) is None:
            return gather(x.contiguous(), made, self.group)[0], whole
        return x[0].contiguous(), Slab(whole, made, self.group)

    def _fetch(self, x: Tensor, spans: list[Span | None]) -> Tensor:
        """The planes (1, C, ...) of every rank's span; None: nothing."""
        own = self.partition.spans
        widths = [
            (0, a - b) if span is None else (a - span[0], span[1] - b) for (a, b), span in zip(own, spans, strict=True)
        ]
        return exchange_halo(x, self.partition, widths, self.group)


def partition_of(shape: Shape3, ranks: int, dim: int | None = None) -> Partition | None:
    """How a grid is shared out; None where it has not two planes for every rank.

    Slabs differ by a twentieth of a slab at most, or by one plane; within that, cuts are on multiples of the largest power
    of two.
    """
    dim = 2 + shape.index(max(shape)) if dim is None else dim
    total = shape[dim - 2]
    if ranks == 1 or total < COARSEST * ranks:
        return None
    block = BLOCK
    while block > 1 and not _alike(Partition.even(total, ranks, dim, block).sizes):
        block //= 2
    return Partition.even(total, ranks, dim, block)


def _alike(sizes: Sequence[int]) -> bool:
    """Whether no slab is a twentieth larger or smaller than the mean."""
    mean = sum(sizes) / len(sizes)
    return 0.95 * mean <= min(sizes) and max(sizes) <= 1.05 * mean


def split_volume(
    volume: Volume, group: dist.ProcessGroup, dim: int | None = None, along: Tensor | None = None
) -> Volume:
    """This rank's slab of a volume that every rank has; a copy, so that the volume can be freed.

    Args:
        volume: on the host, say.
        group: the ranks.
        dim: see :meth:`Slab.of`.
        along: likewise: images of a pair that are cut the same way in the world reach fewer ranks.

    Returns:
        A volume on a :class:`Slab`; the volume itself where it has not two planes for every rank.
    """
    grid = Slab.of(volume.grid, group, dim, along)
    if not isinstance(grid, Slab):
        return volume
    data = grid.partition.cut(volume.batch, grid.rank)[0].clone(memory_format=torch.contiguous_format)
    return Volume(data, grid, volume.name)


class _ShareOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream / ctx.ranks, None
