"""What doubles the resolution, on slabs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from patchreg.distributed.partition import clip
from patchreg.distributed.scope import Scope


def doubled(run: Callable[[Tensor], Tensor], x: Tensor, reach: int, scope: Scope, total: int) -> Tensor:
    """This rank's part of ``run(x)``, which has twice the size of ``x``.

    It is run on the planes that this rank's outputs depend on, as if they were the volume: what it takes to be the border,
    where it is none, is too far away to matter.

    Args:
        run: from (B, C, I, J, K) to (B, c, 2I, 2J, 2K).
        x: this rank's part of a tensor with ``total`` planes.
        reach: how many planes before and after its own an output depends on, in planes of ``x``.
        scope: says how tensors are split.
        total: see ``x``.
    """
    spans = [clip((low // 2 - reach, -(-high // 2) + reach), total) for low, high in scope.spans(2 * total)]
    out = run(scope.bring(x, total, spans))
    low, high = scope.span(2 * total)
    return out.narrow(scope.dim, low - 2 * spans[scope.rank][0], high - low)
