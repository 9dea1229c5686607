"""Normalisation by the means and variances of whole volumes, of which every rank holds a slab."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from patchreg.distributed import communication as comm
from patchreg.distributed.partition import Partition


@dataclass(frozen=True)
class Pool:
    """What one mean and one variance are of.

    Args:
        groups: of channels, with statistics of their own.
        batch: whether those are common to the batch.
    """

    groups: int
    batch: bool = False

    def of(self, numbers: Tensor) -> Tensor:
        """Numbers (..., B, C) by pool: (..., P, n)."""
        found = numbers.unflatten(-1, (self.groups, -1))
        if self.batch:
            found = found.transpose(-3, -2).flatten(-2)
        return found.flatten(-3, -2) if not self.batch else found

    def back(self, pooled: Tensor, shape: tuple[int, int]) -> Tensor:
        """One number of every pool (P,) to (B, C)."""
        batch, channels = shape
        if self.batch:
            return pooled[None, :, None].expand(batch, -1, channels // self.groups).reshape(shape)
        return pooled.view(batch, self.groups, 1).expand(-1, -1, channels // self.groups).reshape(shape)


@dataclass(frozen=True)
class Statistics:
    """Of slabs.

    Args:
        partition: of the volume.
        group: the ranks.
        pool: what they are of.
        eps: added to the variance.
    """

    partition: Partition
    group: dist.ProcessGroup
    pool: Pool
    eps: float

    def numbers(self, x: Tensor) -> int:
        """In one pool of the whole volume."""
        batch, channels = x.shape[:2]
        plane = x[0, 0].numel() // self.partition.sizes[comm.rank_in(self.group)]
        pooled = channels // self.pool.groups * (batch if self.pool.batch else 1)
        return plane * self.partition.total * pooled

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances (uncorrected) of the whole volume, by pool, (P,), from all slabs (B, C, I, J, K).

        References:
            Chan et al. 1983, doi:10.1080/00031305.1983.10483115, eq. (2.1), for many samples at once: variances add up with
            the squared differences of the samples' means from the common one.
        """
        mean, variance = _moments(x)
        gathered = torch.stack(comm.gather_all(torch.stack([mean, variance]), self.group), dim=-1)  # (2, B, C, ranks)
        weights = gathered.new_tensor(self.partition.sizes) / self.partition.total
        means, variances = self.pool.of(gathered.movedim(-1, 1)).unbind()  # (ranks, P, n)
        weights = weights.view(-1, 1, 1) / means.shape[-1]
        common = (weights * means).sum((0, 2))
        spread = (means - common[:, None]).square()
        return common, (weights * (variances + spread)).sum((0, 2))


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, how: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) / sqrt(variance + eps) * weight + bias``.

    Statistics are float32 at least. All ranks exchange a few numbers for each channel, forward and backward. Kept for the
    backward pass: ``x``. There is no second derivative.

    Args:
        x: this rank's slab (B, C, I, J, K).
        weight: (C,), common; its gradient is this rank's part. None: 1.
        bias: the same. None: 0.
        how: the statistics.

    Returns:
        The slab of the output; the means and the variances, (P,), without gradient.

    References:
        Ioffe and Szegedy 2015, arXiv:1502.03167, section 3.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Normalize.apply(x, weight, bias, how)
    return found


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances (uncorrected) of every channel of a slab, (B, C), in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    flat = x.reshape(1, -1, *x.shape[2:])
    if x.dtype == dtype or x.is_cuda:
        mean, variance = torch.batch_norm_update_stats(flat, None, None, 0.0)
    else:  # on the CPU its results are of half precision, too
        parts = [torch.batch_norm_update_stats(part.to(dtype), None, None, 0.0) for part in flat.split(1, 1)]
        mean, variance = (torch.cat(each) for each in zip(*parts, strict=True))
    return mean.view(x.shape[:2]), variance.view(x.shape[:2])


def _affine(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """With other numbers for every channel of every image, all (B, C)."""
    flat = x.reshape(1, -1, *x.shape[2:])
    out = F.batch_norm(flat, mean.flatten(), variance.flatten(), weight.flatten(), bias.flatten(), False, 0.0, eps)
    return torch.ops.aten._unsafe_view.default(out, x.shape)  # not a view of anything: it may be changed in place


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, how: Statistics
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()
        shape = (x.shape[0], x.shape[1])
        means, variances = how.of(x)
        mean, variance = how.pool.back(means, shape), how.pool.back(variances, shape)
        scale = mean.new_ones(shape) if weight is None else weight.to(mean.dtype).expand(shape)
        shift = mean.new_zeros(shape) if bias is None else bias.to(mean.dtype).expand(shape)
        ctx.save_for_backward(x, weight, means, variances)
        ctx.how, ctx.bias_dtype = how, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(means, variances)
        return _affine(x, mean, variance, scale.contiguous(), shift.contiguous(), how.eps), means, variances

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        how: Statistics = ctx.how
        x, weight, means, variances = ctx.saved_tensors
        shape = (x.shape[0], x.shape[1])
        mean, variance = how.pool.back(means, shape), how.pool.back(variances, shape)
        inverse = (variance + how.eps).rsqrt()
        grad = grad.contiguous()
        # sums of the gradient, and of it times the normalised x, of this slab
        _, along, total = torch.ops.aten.native_batch_norm_backward(
            grad.view(1, -1, *x.shape[2:]), x.view(1, -1, *x.shape[2:]), torch.ones_like(mean).flatten(),
            mean.flatten(), variance.flatten(), None, None, False, how.eps, (False, True, True),
        )  # fmt: skip
        along, total = along.view(shape), total.view(shape)
        grad_weight = None if weight is None else along.sum(0).to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else total.sum(0).to(ctx.bias_dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, grad_bias, None
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype).expand(shape)
        pooled = torch.stack([how.pool.of(scale * total).sum(-1), how.pool.of(scale * along).sum(-1)])
        pooled = comm.reduce_all(pooled, "sum", how.group) / how.numbers(x)
        shift, slope = (how.pool.back(each, shape) * inverse for each in pooled)
        # scale inverse grad - shift - slope normalised(x)
        grad_x = _affine(x, mean, variance, -slope, -shift, how.eps)
        factor = (scale * inverse).view(*shape, 1, 1, 1)
        return grad_x.addcmul_(grad, factor.to(grad.dtype)), grad_weight, grad_bias, None
