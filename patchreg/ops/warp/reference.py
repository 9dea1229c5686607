"""``I(A x + t + S u(x))`` in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.ops.precision import full_precision
from patchreg.types import Interpolation, Padding, Shape3


def warp(
    image: Tensor,
    displacement: Tensor | None,
    affine: Tensor | None,
    scale: Tensor | float | None,
    shape: Shape3,
    mode: Interpolation,
    padding: Padding,
) -> Tensor:
    """See :func:`patchreg.ops.warp`; every argument is checked and complete here."""
    likes = [t for t in (affine, displacement) if t is not None]
    own = image.dtype if image.is_floating_point() else likes[0].dtype if likes else torch.float32
    compute = torch.promote_types(own, torch.float32)
    if affine is None:
        affine = torch.eye(3, 4, dtype=compute, device=image.device)[None]
    if isinstance(scale, float | int):
        scale = scale * torch.eye(3, dtype=compute, device=image.device)[None]
    points = coordinates(displacement, affine.to(compute), None if scale is None else scale.to(compute), shape)
    if mode == "linear":
        with torch.autocast(image.device.type, enabled=False):
            sampled = _linear(image.to(compute), points, padding)
        return torch.where(points.isnan().any(dim=1, keepdim=True), torch.nan, sampled).to(image.dtype)
    # Far beyond the image is as good as beyond it, and an integer; a NaN counts as below it.
    size = torch.tensor(image.shape[2:], dtype=points.dtype, device=points.device)[:, None, None, None]
    points = torch.minimum(points.nan_to_num(nan=-3.0).clamp(min=-3.0), size + 2)
    if mode == "nearest":
        return _gather(image, points.round(), padding)
    return _vote(image, points, padding)


@full_precision
def coordinates(displacement: Tensor | None, affine: Tensor, scale: Tensor | None, shape: Shape3) -> Tensor:
    """``A x + t + S u(x)`` for every voxel ``x`` of ``shape``: (B, 3, I, J, K), in the dtype of ``affine``."""
    like = {"dtype": affine.dtype, "device": affine.device}
    i, j, k = (torch.arange(n, **like) for n in shape)  # type: ignore[call-overload]
    column = affine[..., None, None, None]  # (B, 3, 4, 1, 1, 1)
    points: Tensor = (
        column[:, :, 0] * i[:, None, None] + column[:, :, 1] * j[:, None] + column[:, :, 2] * k + column[:, :, 3]
    )
    if displacement is None:
        return points
    u = displacement.to(affine.dtype)
    return points + (u if scale is None else torch.einsum("bcd,bdijk->bcijk", scale, u))


def _linear(image: Tensor, points: Tensor, padding: Padding) -> Tensor:
    size = torch.tensor(image.shape[2:], dtype=points.dtype, device=points.device)
    unit = (2 * points + 1) / size[:, None, None, None] - 1  # align_corners=False: also right for an axis of one voxel
    lattice = unit.flip(1).permute(0, 2, 3, 4, 1)  # torch wants (k, j, i), last
    batch = max(image.shape[0], points.shape[0])
    threads = torch.get_num_threads()
    if (
        batch == 1
        and image.device.type == "cpu"
        and not image.requires_grad
        and lattice[0, ..., 0].numel() % threads == 0
    ):
        # On the CPU torch shares out the batch, not the voxels: give every thread a part of them.
        parts = lattice.reshape(threads, -1, 1, 1, 3)
        out = F.grid_sample(image.expand(threads, -1, -1, -1, -1), parts, padding_mode=padding, align_corners=False)
        return out.transpose(0, 1).reshape(1, image.shape[1], *points.shape[2:])
    image, lattice = image.expand(batch, *image.shape[1:]), lattice.expand(batch, *lattice.shape[1:])
    return F.grid_sample(image, lattice, padding_mode=padding, align_corners=False)


def corners(points: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The eight voxels around each point, (B, 3, I, J, K) integers, and their linear weights, (B, 1, I, J, K)."""
    low = points.floor()
    fraction = points - low
    found = []
    for corner in range(8):
        bit = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1], device=points.device)[:, None, None, None]
        weight = torch.where(bit == 1, fraction, 1 - fraction).prod(dim=1, keepdim=True)
        found.append((low.long() + bit, weight))
    return found


def _gather(image: Tensor, voxel: Tensor, padding: Padding) -> Tensor:
    """``image`` at whole ``voxel`` positions (B, 3, I, J, K); outside it zero, or the nearest voxel's value."""
    size = torch.tensor(image.shape[2:], device=voxel.device)[:, None, None, None]
    voxel = voxel.long()
    clamped = torch.minimum(voxel.clamp(min=0), size - 1)
    flat = (clamped[:, 0] * size[1] + clamped[:, 1]) * size[2] + clamped[:, 2]  # (B, I, J, K)
    batch, channels = max(image.shape[0], voxel.shape[0]), image.shape[1]
    source = image.flatten(2).expand(batch, -1, -1)
    index = flat.flatten(1)[:, None].expand(batch, channels, -1)
    value = source.gather(2, index).unflatten(2, tuple(voxel.shape[2:]))
    if padding == "border":
        return value
    inside = (voxel == clamped).all(dim=1, keepdim=True)
    return torch.where(inside, value, torch.zeros((), dtype=value.dtype, device=value.device))


def _vote(image: Tensor, points: Tensor, padding: Padding) -> Tensor:
    """The label with the largest sum of linear weights among the eight neighbours; a tie goes to the first."""
    neighbours = [(_gather(image, voxel, padding), weight) for voxel, weight in corners(points)]
    best, most = neighbours[0][0], torch.zeros_like(neighbours[0][1])
    for label, _ in neighbours:
        votes = torch.zeros_like(most)
        for other, weight in neighbours:
            votes = votes + torch.where(other == label, weight, 0.0)
        best, most = torch.where(votes > most, label, best), torch.maximum(votes, most)
    return best
