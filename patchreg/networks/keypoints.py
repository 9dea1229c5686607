"""Affine registration by learned keypoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchreg.networks.padding import pad_to_multiple
from patchreg.networks.unet import UNet
from patchreg.types import Activations


class KeypointAffine(nn.Module):
    """An affine map from the centres of mass of learned feature maps.

    One network, blind to the other image, turns each image into feature maps; the centres of mass of corresponding
    maps are a pair of points, and the affine map is their weighted least-squares fit in closed form. So large
    rotations and shifts need not be learned one by one, and equal images give exactly the identity.

    The fit is held to the identity by a small ridge, and the last layer starts small, so that an untrained network
    gives nearly the identity.

    Args:
        encoder: width of every level, from full resolution down.
        decoder: width of every upsampling step.
        keypoints: number of feature maps.
        kernel_size: odd side of every kernel.
        norm: instance normalisation after every convolution.
        ridge: weight of the identity in the fit; total weight of the points is 1.
        channels: of each image.
        memory: what is kept for the backward pass: ``"stored"``, all; ``"checkpoint"``, what enters convolutions.

    References:
        Hoffmann et al. 2024, arXiv:2301.11329, eq. (3) to (6); Yu et al. 2022 (KeyMorph), arXiv:2304.09941.
    """

    def __init__(
        self,
        encoder: Sequence[int] = (16, 32, 64, 64),
        decoder: Sequence[int] = (64, 64),
        keypoints: int = 64,
        kernel_size: int = 3,
        norm: bool = True,
        ridge: float = 1e-4,
        channels: int = 1,
        memory: Activations = "stored",
    ) -> None:
        super().__init__()
        self.unet = UNet(channels, tuple(encoder), tuple(decoder), (), kernel_size, norm, memory=memory)
        self.head = nn.Conv3d(self.unet.channels_out, keypoints, kernel_size, padding=kernel_size // 2)
        nn.init.normal_(self.head.weight, std=1e-4)
        nn.init.constant_(self.head.bias, 0.1)  # type: ignore[arg-type]
        self.ridge = ridge

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """(B, 3, 4): fixed to moving, in the patch's frame, where its longest side runs from -1 to 1 about its centre."""
        points, mass = self.detect(torch.cat([fixed, moving]))
        points_fixed, points_moving = points.double().chunk(2)
        mass_fixed, mass_moving = mass.double().chunk(2)
        weight = mass_fixed * mass_moving
        return fit_affine(points_fixed, points_moving, weight / weight.sum(dim=1, keepdim=True), self.ridge).float()

    def detect(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keypoints (B, N, 3) in the patch's frame and their share of the feature mass (B, N)."""
        size = torch.tensor(image.shape[2:], dtype=torch.float32, device=image.device)
        x, cut = pad_to_multiple(image, self.unet.multiple)
        maps = self.head(self.unet(x))
        with torch.autocast(image.device.type, enabled=False):
            maps = torch.relu(maps.float()) + 1e-6
            axes = []
            for dim, where in enumerate(cut):
                # centres of the (coarser) output voxels in voxels of the image, then in the frame
                index = (torch.arange(maps.shape[2 + dim], device=image.device) + 0.5) * self.unet.reduction - 0.5
                axes.append((index - where.start - (size[dim] - 1) / 2) / (size.max() / 2))
            mass = maps.sum(dim=(2, 3, 4))
            moments = [
                torch.einsum("bnijk,i->bn", maps, axes[0]),
                torch.einsum("bnijk,j->bn", maps, axes[1]),
                torch.einsum("bnijk,k->bn", maps, axes[2]),
            ]
        return torch.stack(moments, dim=-1) / mass[..., None], mass / mass.sum(dim=1, keepdim=True)


def fit_affine(source: Tensor, target: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """The affine map that takes source points to target points in the weighted least-squares sense.

    Minimises ``sum w |A s + t - p|^2 + ridge |[A t] - [I 0]|^2``.

    Args:
        source: (B, N, 3).
        target: (B, N, 3).
        weight: (B, N), summing to one.
        ridge: pull to the identity.

    Returns:
        (B, 3, 4), ``[A | t]``.
    """
    ones = torch.ones_like(source[..., :1])
    x = torch.cat([source, ones], dim=-1)
    weighted = x * weight[..., None]
    eye = torch.eye(4, dtype=x.dtype, device=x.device)
    normal = weighted.transpose(1, 2) @ x + ridge * eye
    right = weighted.transpose(1, 2) @ target + ridge * eye[:, :3]
    return torch.linalg.solve(normal, right).transpose(1, 2)
