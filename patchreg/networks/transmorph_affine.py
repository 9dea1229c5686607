"""The affine network of TransMorph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchreg.networks.checkpointing import check_policy, offloading
from patchreg.networks.padding import PadToMultiple
from patchreg.networks.swin import SwinEncoder, SwinSize
from patchreg.networks.transmorph import find_size
from patchreg.types import Activations


class TransMorphAffine(nn.Module):
    """A Swin transformer on both images, whose deepest tokens' mean gives the twelve parameters of an affine map.

    Any size is taken: it is padded to a multiple of 32. At the start of training the map is exactly the identity.

    Args:
        size: "tiny", "small", "base" or "large", as of :class:`patchreg.networks.TransMorph`; or widths and depths of
            one's own.
        window: tokens (of 4 voxels) of a window along the axes.
        channels: of each image.
        drop_path: probability with which the last block's branches are dropped in training. None: the size's.
        memory: what is kept for the backward pass, see :class:`patchreg.networks.TransMorph`.
        offload: what is kept goes to host memory.
        reversible: the transformer's blocks are reversible.

    Raises:
        InputError: options that make no network.

    References:
        Chen et al. 2022, arXiv:2111.10480, for an affine map by rotation, translation, scaling and shearing.
    """

    def __init__(
        self,
        size: str | SwinSize = "small",
        window: Sequence[int] = (4, 4, 4),
        channels: int = 1,
        drop_path: float | None = None,
        memory: Activations = "stored",
        offload: bool = False,
        reversible: bool = False,
    ) -> None:
        super().__init__()
        check_policy(memory, reversible, type(self).__name__)
        self.encoder = SwinEncoder(2 * channels, find_size(size, drop_path), window, memory, reversible)
        self.pad = PadToMultiple(self.encoder.multiple)
        width = self.encoder.widths[-1]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 12)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.offload = offload

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """(B, 3, 4): fixed to moving, in the patch's frame, where its longest side runs from -1 to 1 about its centre."""
        self.encoder.check_size(fixed.shape[2:])
        x = self.pad(torch.cat([fixed, moving], dim=1))
        with offloading(self.offload, x.device):
            deepest = self.encoder(x)[-1]
        pooled = self.norm(deepest).mean(dim=(1, 2, 3))
        with torch.autocast(x.device.type, enabled=False):
            return compose_affine(self.head(pooled.to(self.head.weight.dtype)))


def compose_affine(parameters: Tensor) -> Tensor:
    """``[R S H | t]``: shear, then scale, then rotate, then translate. Every map that keeps orientation has one such form.

    Args:
        parameters: (B, 12): the rotation's axis times its angle in radians; ``t``; the logarithms of the scales; the
            shears of the first axis along the second and third, and of the second along the third.

    Returns:
        (B, 3, 4).
    """
    turn, shift, scale, shear = parameters.split(3, dim=1)
    rotation = torch.linalg.matrix_exp(_strict(turn.flip(1) * turn.new_tensor([-1, 1, -1]), antisymmetric=True))
    upper = torch.eye(3, dtype=shear.dtype, device=shear.device) + _strict(shear, antisymmetric=False)
    return torch.cat([rotation * scale.exp()[:, None] @ upper, shift[..., None]], dim=2)


def _strict(values: Tensor, antisymmetric: bool) -> Tensor:
    """(B, 3) to matrices (B, 3, 3) with these above the diagonal, row by row, and their negatives below it or zeros."""
    a, b, c = values.unbind(1)
    zero = torch.zeros_like(a)
    upper = torch.stack([zero, a, b, zero, zero, c, zero, zero, zero], dim=1).view(-1, 3, 3)
    return upper - upper.transpose(1, 2) if antisymmetric else upper
