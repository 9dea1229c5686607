"""Instance, group and batch normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.layers.statistics import Pool, Statistics, normalize
from patchreg.distributed.scope import Scope


def instance_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scope: Scope,
    total: int,
) -> Tensor:
    """``F.instance_norm`` on slabs, by the statistics of the whole volume.

    Args:
        x: this rank's part of a tensor (B, C, I, J, K) with ``total`` planes.
        weight: (C,), common, or None.
        bias: the same.
        eps: added to the variance.
        scope: says how tensors are split.
        total: see ``x``.

    Returns:
        This rank's part of the output.
    """
    if scope.layout.of(total) is None:
        return F.instance_norm(x, weight=weight, bias=bias, eps=eps)
    return _normalize(x, weight, bias, Pool(x.shape[1]), eps, scope, total)[0]


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    scope: Scope,
    total: int,
) -> Tensor:
    """``F.group_norm`` on slabs; see :func:`instance_norm`."""
    if scope.layout.of(total) is None:
        return F.group_norm(x, groups, weight, bias, eps)
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        x = x.float()  # as autocast has it in one process
    return _normalize(x, weight, bias, Pool(groups), eps, scope, total)[0]


def _normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, pool: Pool, eps: float, scope: Scope, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    partition = scope.layout.of(total)
    assert partition is not None
    return normalize(x, weight, bias, Statistics(partition, scope.group, pool, eps))


def _corrected(variance: Tensor, x: Tensor, scope: Scope, total: int, samples: int) -> Tensor:
    """The unbiased variance, which is what layers keep."""
    numbers = samples * total * (x[0, 0].numel() // x.shape[scope.dim])
    return variance * (numbers / (numbers - 1))


@stands_for(nn.InstanceNorm3d)
class ShardedInstanceNorm3d(ShardedLayer, nn.InstanceNorm3d):
    """``nn.InstanceNorm3d``, of images (B, C, I, J, K)."""

    def sharded(self, x: Tensor, *, scope: Scope, total: int) -> Tensor:  # type: ignore[override]
        own = self.training or not self.track_running_stats
        if not own or scope.layout.of(total) is None:
            return nn.InstanceNorm3d.forward(self, x)
        out, mean, variance = _normalize(x, self.weight, self.bias, Pool(x.shape[1]), self.eps, scope, total)
        if self.running_mean is not None and self.running_var is not None:
            variance = _corrected(variance, x, scope, total, 1)
            share = self.momentum or 0.0
            for running, seen in ((self.running_mean, mean), (self.running_var, variance)):
                running.lerp_(seen.view(x.shape[:2]).mean(0).to(running.dtype), share)
        return out


@stands_for(nn.GroupNorm)
class ShardedGroupNorm(ShardedLayer, nn.GroupNorm):
    """``nn.GroupNorm``, of images (B, C, I, J, K)."""

    def sharded(self, x: Tensor, *, scope: Scope, total: int) -> Tensor:  # type: ignore[override]
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, scope=scope, total=total)


@stands_for(nn.BatchNorm3d)
class ShardedBatchNorm3d(ShardedLayer, nn.BatchNorm3d):
    """``nn.BatchNorm3d``: in training the statistics are of the whole volumes of this group's batch."""

    def sharded(self, x: Tensor, *, scope: Scope, total: int) -> Tensor:  # type: ignore[override]
        own = self.training or self.running_mean is None
        if not own or scope.layout.of(total) is None:
            return nn.BatchNorm3d.forward(self, x)
        pool = Pool(x.shape[1], batch=True)
        out, mean, variance = _normalize(x, self.weight, self.bias, pool, self.eps, scope, total)
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            share = 1 / float(self.num_batches_tracked) if momentum is None else momentum
            variance = _corrected(variance, x, scope, total, x.shape[0])
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
                self.running_var.lerp_(variance.to(self.running_var.dtype), share)
        return out
