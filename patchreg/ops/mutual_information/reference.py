"""Mutual information in plain PyTorch: Parzen weights and their product, a slice of the voxels at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SLICE = 1 << 17  # voxels whose Parzen weights exist at one time

Range = tuple[float, float] | None


def mutual_information(
    fixed: Tensor,
    moving: Tensor,
    bins: int,
    mask: Tensor | None,
    window: str,
    normalized: bool,
    fixed_range: Range,
    moving_range: Range,
) -> Tensor:
    """See :func:`patchreg.ops.mutual_information`."""
    dtype = torch.promote_types(fixed.dtype, torch.float32)
    values = []
    for b in range(fixed.shape[0]):
        weight = None if mask is None else mask[b, 0].to(dtype).flatten()
        for c in range(fixed.shape[1]):
            I = bin_coordinate(fixed[b, c].to(dtype).flatten(), bins, fixed_range)
            J = bin_coordinate(moving[b, c].to(dtype).flatten(), bins, moving_range)
            values.append(information(_joint_histogram(I, J, weight, bins, window), normalized))
    return torch.stack(values).mean()


def bin_coordinate(x: Tensor, bins: int, limits: Range) -> Tensor:
    """Intensity to a position among bins 0..bins-1, one bin from either end so that every window fits."""
    low, high = limits if limits is not None else torch.aminmax(x.detach())
    span = high - low
    if isinstance(span, Tensor):  # one intensity only: all in one place, and no gradient
        span = torch.where(span == 0, torch.inf, span)
    place = (x - low) / span
    # The gradient of torch.clamp at its two ends differs between versions of torch; here it passes.
    place = torch.where(place < 0, 0, torch.where(place > 1, 1, place))
    return 1 + (bins - 3) * place


def _joint_histogram(I: Tensor, J: Tensor, weight: Tensor | None, bins: int, window: str) -> Tensor:
    total = torch.zeros(bins, bins, dtype=I.dtype, device=I.device)
    with torch.autocast(I.device.type, enabled=False):
        for start in range(0, I.numel(), SLICE):
            part = slice(start, start + SLICE)
            w = None if weight is None else weight[part]
            total = total + checkpoint(
                histogram, I[part], J[part], w, bins, window, use_reentrant=False, preserve_rng_state=False
            )
    count = total.sum()
    return total / torch.where(count == 0, 1, count)  # nothing selected: no counts, no information


def histogram(I: Tensor, J: Tensor, weight: Tensor | None, bins: int, window: str) -> Tensor:
    """Joint counts (bins, bins) of positions I and J (voxels,) among the bins, by weight (voxels,) where there is one."""
    left = _parzen(I, bins, window)
    if weight is not None:
        left = left * weight[:, None]
    return left.T @ _parzen(J, bins, window)


def _parzen(position: Tensor, bins: int, window: str) -> Tensor:
    """Weights (voxels, bins) of each voxel in each bin, summing to one over the bins."""
    distance = (position[:, None] - torch.arange(bins, dtype=position.dtype, device=position.device)).abs()
    if window == "gaussian":
        return torch.softmax(-0.5 * (distance / 0.5) ** 2, dim=1)
    near = 2 / 3 - distance**2 * (1 - distance / 2)
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far)


def information(joint: Tensor, normalized: bool) -> Tensor:
    """``H(I) + H(J) - H(I, J)`` in nats of joint probabilities (bins, bins), or ``(H(I) + H(J)) / H(I, J)``."""

    def entropy(p: Tensor) -> Tensor:
        return -torch.special.xlogy(p, p.clamp(min=torch.finfo(p.dtype).tiny)).sum()

    h_i, h_j, h_ij = entropy(joint.sum(dim=1)), entropy(joint.sum(dim=0)), entropy(joint)
    if not normalized:
        return h_i + h_j - h_ij
    return torch.where(h_ij == 0, 1, (h_i + h_j) / torch.where(h_ij == 0, 1, h_ij))
