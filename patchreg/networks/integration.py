"""The flow of a stationary velocity, as a layer."""

from __future__ import annotations

from torch import Tensor, nn

from patchreg import ops


class Integration(nn.Module):
    """Scaling and squaring: :func:`patchreg.ops.integrate`.

    Args:
        steps: squarings.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def extra_repr(self) -> str:
        return f"steps={self.steps}"

    def forward(self, velocity: Tensor) -> Tensor:
        """A velocity (B, 3, I, J, K) in voxels of its own lattice to a displacement."""
        return ops.integrate(velocity, self.steps)
