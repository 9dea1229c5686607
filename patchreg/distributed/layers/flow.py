"""The parts of a registration network that have no parameters, on slabs."""

from __future__ import annotations

from torch import Tensor

from patchreg.distributed.fields import integrate, lncc_force
from patchreg.distributed.layers.base import ShardedLayer, stands_for
from patchreg.distributed.scope import Scope
from patchreg.networks.force import LnccForce
from patchreg.networks.integration import Integration


@stands_for(LnccForce)
class ShardedLnccForce(ShardedLayer, LnccForce):
    """:func:`patchreg.distributed.fields.lncc_force`."""

    def sharded(self, x: Tensor, *others: Tensor, scope: Scope, total: int) -> Tensor:
        (moving,), partition = others, scope.layout.of(total)
        if partition is None:
            return LnccForce.forward(self, x, moving)
        return lncc_force(x, moving, self.window, partition, scope.group)


@stands_for(Integration)
class ShardedIntegration(ShardedLayer, Integration):
    """:func:`patchreg.distributed.fields.integrate`."""

    def sharded(self, x: Tensor, *others: Tensor, scope: Scope, total: int) -> Tensor:
        partition = scope.layout.of(total)
        if partition is None:
            return Integration.forward(self, x)
        return integrate(x, partition, self.steps, group=scope.group)
