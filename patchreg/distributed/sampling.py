"""Sampling a slab of the output from a slab of the image, both at their places in whole volumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patchreg import ops
from patchreg.distributed import communication as comm
from patchreg.distributed.partition import Partition, Span, clip
from patchreg.distributed.reach import read_planes
from patchreg.fake import is_fake
from patchreg.ops.dispatch import is_native
from patchreg.ops.warp import native
from patchreg.types import Backend, Interpolation, Padding, Shape3


@dataclass(frozen=True, eq=False)
class Motion:
    """``A x + t + S u(x)`` from voxels of the whole output to voxels of the whole image.

    Args:
        displacement: ``u`` on the slab of the output, (B, 3, i, j, k), or None.
        affine: ``[A | t]``, (B, 3, 4).
        scale: ``S``, (B, 3, 3), a number, or None.
    """

    displacement: Tensor | None
    affine: Tensor
    scale: Tensor | float | None


@dataclass(frozen=True)
class Sampling:
    """What all slabs have in common.

    Args:
        dim: the dimension that is split.
        origin: the first voxel of the output's slab, in the whole output.
        shape: of the output's slab, (i, j, k).
        mode: see :func:`patchreg.ops.warp`.
        padding: likewise.
        backend: likewise.
    """

    dim: int
    origin: Shape3
    shape: Shape3
    mode: Interpolation
    padding: Padding
    backend: Backend

    def affine(self, whole: Tensor, first: int) -> Tensor:
        """``[A | t]`` from voxels of the output's slab to those of the image's slab, whose first plane is ``first``."""
        origin = whole.new_tensor(self.origin, dtype=torch.float64)
        image = torch.zeros_like(origin)
        image[self.dim - 2] = first
        matrix, shift = whole[..., :3].double(), whole[..., 3].double()
        return torch.cat([matrix, (shift + matrix @ origin - image)[..., None]], dim=-1)

    def pieces(self, motion: Motion) -> Iterator[tuple[slice, Sampling, Motion]]:
        """The slab in four parts: which planes along dim 2, and what is sampled there."""
        i, j, k = self.shape
        step = max(1, -(-i // 4))
        for start in range(0, i, step):
            planes = slice(start, min(start + step, i))
            origin = (self.origin[0] + start, self.origin[1], self.origin[2])
            u = motion.displacement
            part = replace(motion, displacement=None if u is None else u[:, :, planes])
            yield planes, replace(self, origin=origin, shape=(planes.stop - start, j, k)), part

    def sample(self, slab: Tensor, first: int, motion: Motion) -> Tensor:
        """The slab (B, C, ...) of an image that begins at plane ``first``, sampled: (B, C, i, j, k)."""
        return ops.warp(
            slab,
            motion.displacement,
            self.affine(motion.affine, first),
            motion.scale,
            None if motion.displacement is not None else self.shape,
            self.mode,
            self.padding,
            self.backend,
        )

    def differentiate(
        self, upstream: Tensor, slab: Tensor, first: int, motion: Motion, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients to slab, displacement, affine and scale, None for those that are not wanted."""
        affine = motion.affine.detach().requires_grad_()
        with torch.enable_grad():
            shifted = self.affine(affine, first)
        found = list(self._differentiate(upstream, slab, shifted.detach(), motion, wanted))
        if wanted[2]:
            found[2] = torch.autograd.grad(shifted, affine, found[2])[0]
        return found

    def _differentiate(
        self, upstream: Tensor, slab: Tensor, affine: Tensor, motion: Motion, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        displacement, scale = motion.displacement, motion.scale
        if is_native("warp", self.backend, slab, displacement):
            matrix, step = native.split_scale(scale)
            border = self.padding == "border"
            grads = torch.ops.patchreg.warp_backward(
                upstream,
                slab,
                slab.shape,
                slab.dtype,
                displacement,
                affine,
                matrix,
                step,
                self.mode,
                border,
                False,
                wanted,
            )
            return [grad if wants else None for grad, wants in zip(grads, wanted, strict=True)]
        inputs: list[Any] = [slab, displacement, affine, scale]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() if wants else x for x, wants in zip(inputs, wanted, strict=True)]
            shape = None if displacement is not None else self.shape
            image, u, at, by = leaves
            out = ops.warp(image, u, at, by, shape, self.mode, self.padding, self.backend)
        found = iter(torch.autograd.grad(out, [x for x, wants in zip(leaves, wanted, strict=True) if wants], upstream))
        return [next(found) if wants else None for wants in wanted]


def origin_of(start: int, dim: int) -> Shape3:
    """The first voxel of a slab that begins at a plane."""
    i, j, k = (start if axis == dim - 2 else 0 for axis in range(3))
    return i, j, k


def wanted_planes(motion: Motion, sampling: Sampling, total: int, group: dist.ProcessGroup) -> Span:
    """The planes of an image of ``total`` planes that the slab is sampled from.

    From an even one for ``"nearest"``, which rounds halves to even planes.
    """
    whole = sampling.affine(motion.affine.detach(), 0)
    unknown = motion.displacement is not None and is_fake(motion.displacement)
    low, high = read_planes(
        None if unknown else motion.displacement,
        whole,
        motion.scale,
        sampling.shape,
        sampling.dim,
        total,
        sampling.padding,
    )
    if unknown and isinstance(group, comm.Pretended):
        low, high = clip((low - group.reach, high + group.reach), total)
    return (low - low % 2 if sampling.mode == "nearest" else low), high


def everybodys_planes(
    gathered: Sequence[Span], partition: Partition, output: Partition, group: dist.ProcessGroup
) -> tuple[Span, ...]:
    """The planes that every rank wants, as the ranks have told each other; in a pretended group, as this one would."""
    if not isinstance(group, comm.Pretended):
        return tuple(gathered)
    low, high = gathered[comm.rank_in(group)]
    start, stop = output.bounds(comm.rank_in(group))
    return tuple(clip((a + low - start, b + high - stop), partition.total) for a, b in output.spans)


def along(
    dim: int, image: Tensor, partition: Partition, affine: Tensor, scale: Tensor
) -> tuple[Tensor, Partition, Tensor, Tensor]:
    """An image split along one dimension as one that is split along ``dim``, and the maps to its voxels to match.

    Args:
        dim: 2, 3 or 4.
        image: this rank's slab, (B, C, I, J, K); what is returned is a copy.
        partition: of the image.
        affine: ``[A | t]``, (3, 4), to its voxels.
        scale: ``S``, (3, 3), likewise.
    """
    order = [0, 1, 2]
    order[partition.dim - 2], order[dim - 2] = order[dim - 2], order[partition.dim - 2]
    moved = image.transpose(partition.dim, dim).contiguous()
    return moved, Partition(partition.sizes, dim), affine[order], scale[order]
