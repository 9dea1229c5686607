"""VoxelMorph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from patchreg.errors import InputError
from patchreg.networks.checkpointing import check_policy, offloading
from patchreg.networks.force import LnccForce
from patchreg.networks.integration import Integration
from patchreg.networks.padding import PadToMultiple
from patchreg.networks.unet import UNet
from patchreg.types import Activations


class VoxelMorph(nn.Module):
    """A U-Net from a pair of images to a displacement, optionally the flow of a stationary velocity.

    Any size is taken: it is padded to a multiple of ``2**(levels - 1)`` and cut back. At the start of training the
    displacement is close to zero.

    Args:
        encoder: width of every level, from full resolution down.
        decoder: width of every upsampling step, from the coarsest up. One step fewer than the encoder has gives a
            half-resolution flow, two fewer a quarter: much less memory and time, and a smoother field.
        final: widths of further convolutions at the flow's resolution.
        kernel_size: odd side of every kernel.
        norm: instance normalisation after every convolution.
        integration_steps: 0: the network's output is the displacement; otherwise it is a velocity, integrated by
            scaling and squaring in this many steps at the flow's resolution (the diffeomorphic variant).
        channels: of each image.
        force_window: 0: the network sees the two images, as in the paper. An odd number: it also sees where the gradient
            of their local correlation in such a window points (:func:`patchreg.networks.force.lncc_force`), a hint with
            which it learns in hundreds of steps what takes it thousands without.
        memory: what is kept for the backward pass: ``"stored"``, all; ``"checkpoint"``, the same results for less memory
            and more time: with norm or stacks what enters convolutions and blocks, without them nothing of full
            resolution, which is made slab by slab; ``"reversible"``, of each reversible stack only the output.
        offload: what is kept goes to host memory.
        reversible: blocks of a reversible stack after every level of the encoder and step of the decoder, which are the
            identity at the start (:mod:`patchreg.networks.reversible`). 0: the paper's network.

    References:
        Balakrishnan et al. 2019, arXiv:1809.05231, fig. 3; Dalca et al. 2018, arXiv:1805.04605, for the velocity.
    """

    def __init__(
        self,
        encoder: Sequence[int] = (16, 32, 32, 32, 32),
        decoder: Sequence[int] = (32, 32, 32, 32),
        final: Sequence[int] = (32, 16, 16),
        kernel_size: int = 3,
        norm: bool = False,
        integration_steps: int = 0,
        channels: int = 1,
        force_window: int = 0,
        memory: Activations = "stored",
        offload: bool = False,
        reversible: int = 0,
    ) -> None:
        super().__init__()
        if integration_steps < 0:
            raise InputError(f"integration_steps must not be negative, got {integration_steps}")
        if force_window < 0 or (force_window and force_window % 2 == 0):
            raise InputError(f"force_window must be 0 or odd, got {force_window}")
        check_policy(memory, reversible > 0, type(self).__name__)
        self.memory, self.offload = memory, offload
        self.force = LnccForce(force_window) if force_window else None
        self.unet = UNet(
            2 * channels + (3 if force_window else 0),
            tuple(encoder),
            tuple(decoder),
            tuple(final),
            kernel_size,
            norm,
            memory=memory,
            reversible=reversible,
        )
        self.pad = PadToMultiple(self.unet.multiple)
        self.flow = nn.Conv3d(self.unet.channels_out, 3, kernel_size, padding=kernel_size // 2)
        nn.init.normal_(self.flow.weight, std=1e-5)
        nn.init.zeros_(self.flow.bias)  # type: ignore[arg-type]
        self.integrate = Integration(integration_steps) if integration_steps else None
        scale = self.unet.reduction
        self.enlarge = nn.Upsample(scale_factor=scale, mode="trilinear", align_corners=False) if scale > 1 else None

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """Displacement (B, 3, I, J, K) float32, in voxels, from two images (B, C, I, J, K)."""
        seen = [fixed, moving]
        if self.force is not None:
            seen.append(self.force(fixed, moving).to(fixed.dtype))
        x = self.pad(torch.cat(seen, dim=1))
        with offloading(self.offload, x.device):
            flow = self.unet(x, self.flow)
        with torch.autocast(x.device.type, enabled=False):
            if self.integrate is not None:
                flow = self.integrate(flow / self.unet.reduction) * self.unet.reduction
            if self.enlarge is not None:
                flow = self.enlarge(flow)
        return self.pad.crop(fixed, flow)
