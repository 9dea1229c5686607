"""What an optimiser of local correlation would do next, as an input for a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchreg import ops


class LnccForce(nn.Module):
    """:func:`lncc_force` as a layer.

    Args:
        window: odd side of the correlation's window, in voxels.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def extra_repr(self) -> str:
        return f"window={self.window}"

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """(B, C, I, J, K) and the same to (B, 3, I, J, K) float32."""
        return lncc_force(fixed, moving, self.window)


def lncc_force(fixed: Tensor, moving: Tensor, window: int) -> Tensor:
    """The direction in which a displacement raises the local squared correlation, at every voxel.

    ``F = dLNCC/dm(x) * grad m(x)``, divided by its root mean square over the volume, so that it has no unit and does not
    depend on the images' intensities; where the images carry nothing it is zero. It keeps its sign when either image
    is inverted.

    Args:
        fixed: (B, C, I, J, K).
        moving: the same shape.
        window: odd side of the correlation's window, in voxels.

    Returns:
        (B, 3, I, J, K) float32, along the voxel axes. No gradient passes.

    References:
        Avants et al. 2008, doi:10.1016/j.media.2007.06.004, eq. (6), for the gradient; Qiu et al. 2022,
        doi:10.1016/j.media.2022.102561 (GraDIRN), for gradients of the similarity as a network's input.
    """
    force = forces(fixed, moving, window)
    size = force.square().mean(dim=(1, 2, 3, 4), keepdim=True).sqrt()
    return force / size.clamp(min=torch.finfo(torch.float32).tiny)


def forces(fixed: Tensor, moving: Tensor, window: int) -> Tensor:
    """:func:`lncc_force` before it is divided by its size."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(fixed.device.type, enabled=False):
        still, image = (x.detach().float().clone() for x in (fixed, moving))
        image.requires_grad_()
        similarity = ops.lncc(still, image, window, reduction="sum")
        (rise,) = torch.autograd.grad(similarity, image)
    with torch.no_grad():
        image = image.detach()
        return torch.cat([(rise * _slope(image, dim)).sum(dim=1, keepdim=True) for dim in (2, 3, 4)], dim=1)


def _slope(x: Tensor, dim: int) -> Tensor:
    """Half the difference of both neighbours; at the border of the nearest pair."""
    result: Tensor = torch.gradient(x, dim=dim)[0]
    return result
