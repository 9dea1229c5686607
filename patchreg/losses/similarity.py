"""How alike two images are. Every loss is lower for more alike images."""

from __future__ import annotations

from torch import Tensor, nn

from patchreg import ops
from patchreg.types import Backend, Memory


class LNCC(nn.Module):
    """``1 - lncc``: for images whose intensities are locally related by a linear map.

    Args:
        window: odd side of the window in voxels.
        eps: added to the product of the variances.
        kernel: ``"box"`` or ``"gaussian"``.
        memory: ``"stored"`` or ``"recompute"``; see :func:`patchreg.ops.lncc`.
        backend: see :mod:`patchreg.ops`.
    """

    def __init__(
        self,
        window: int = 9,
        eps: float = 1e-5,
        kernel: str = "box",
        memory: Memory = "stored",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.window, self.eps, self.kernel, self.memory, self.backend = window, eps, kernel, memory, backend

    def forward(self, fixed: Tensor, moved: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, C, I, J, K), mask (B, 1, I, J, K); a scalar from 0 to 1."""
        value = ops.lncc(
            fixed, moved, self.window, self.eps, mask, kernel=self.kernel, memory=self.memory, backend=self.backend
        )
        return 1 - value


class MutualInformation(nn.Module):
    """The negative mutual information, in nats: for images of different contrast.

    Args:
        bins: of each image's histogram.
        window: Parzen window, ``"bspline"`` or ``"gaussian"``.
        normalized: ``2 - nmi`` instead, from 0 to 1.
        backend: see :mod:`patchreg.ops`.
    """

    def __init__(
        self, bins: int = 32, window: str = "bspline", normalized: bool = False, backend: Backend = "auto"
    ) -> None:
        super().__init__()
        self.bins, self.window, self.normalized, self.backend = bins, window, normalized, backend

    def forward(self, fixed: Tensor, moved: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, C, I, J, K), mask (B, 1, I, J, K); a scalar."""
        value = ops.mutual_information(
            fixed, moved, self.bins, mask, self.window, self.normalized, backend=self.backend
        )
        return 2 - value if self.normalized else -value


class MSE(nn.Module):
    """The mean squared difference, over the mask where there is one."""

    def forward(self, fixed: Tensor, moved: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images (B, C, I, J, K), mask (B, 1, I, J, K); a scalar."""
        square = (fixed - moved).square()
        if mask is None:
            return square.mean()
        weight = mask.to(square.dtype).expand_as(square)
        return (square * weight).sum() / weight.sum().clamp(min=1)
