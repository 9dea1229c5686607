"""Normalisation and leaky ReLU in one on slabs, and what is made of them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.layers.normalization import ShardedInstanceNorm3d, instance_norm
from patchreg.distributed.scope import Scope
from patchreg.networks.activation import normalized_relu
from patchreg.networks.normconv import EPS, SLOPE, activated
from patchreg.networks.reversible import PreActivated
from patchreg.networks.surroundings import ALONE, surrounded


def sharded_normalized_relu(x: Tensor, norm: nn.Module, slope: float, scope: Scope) -> Tensor:
    """:func:`patchreg.networks.activation.normalized_relu` of this rank's part of a tensor, which keeps no more."""
    if type(norm) is not ShardedInstanceNorm3d or norm.track_running_stats:
        return F.leaky_relu(norm(x), slope)
    total = scope.total(norm, x.shape[scope.dim])
    if scope.layout.of(total) is None:
        with surrounded(ALONE):
            return normalized_relu(x, norm, slope)
    return F.leaky_relu_(instance_norm(x, norm.weight, norm.bias, norm.eps, scope=scope, total=total), slope)


def sharded_activated(x: Tensor, scope: Scope, total: int) -> Tensor:
    """:func:`patchreg.networks.normconv.activated` of this rank's part of a tensor with ``total`` planes."""
    if scope.layout.of(total) is None:
        return activated(x)
    return F.leaky_relu_(instance_norm(x, eps=EPS, scope=scope, total=total), SLOPE)


@stands_for(PreActivated)
class ShardedPreActivated(ShardedLayer, PreActivated):
    """Its layers do what there is to do."""

    def sharded(self, x: Tensor, *others: Tensor, scope: Scope, total: int) -> Tensor:
        if self.norm is None:
            return PreActivated.forward(self, x)
        out: Tensor = self.conv(sharded_normalized_relu(x, self.norm, self.slope, scope))
        return out
