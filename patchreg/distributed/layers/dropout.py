"""Dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.scope import Scope


@stands_for(nn.Dropout)
class ShardedDropout(ShardedLayer, nn.Dropout):
    """``nn.Dropout`` with other random numbers on every slab.

    The generator of the host, which is common, goes on by one number, however large the slab is: what draws from it later
    draws the same on all ranks.
    """

    elementwise = True

    def sharded(self, x: Tensor, *, scope: Scope, total: int) -> Tensor:  # type: ignore[override]
        if not self.training or self.p == 0 or scope.layout.of(total) is None:
            return nn.Dropout.forward(self, x)
        seed = int(torch.empty((), dtype=torch.int64).random_())
        generator = torch.Generator(x.device).manual_seed((seed + scope.rank) % 2**63)
        kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - self.p, generator=generator)
        return x * kept * (1 / (1 - self.p) if self.p < 1 else 0.0)
