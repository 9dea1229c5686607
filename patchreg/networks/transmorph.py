"""TransMorph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from patchreg import ops
from patchreg.errors import InputError
from patchreg.networks.bspline import control_shape, dense_bspline
from patchreg.networks.checkpointing import check_policy, offloading
from patchreg.networks.decoder import Decoder
from patchreg.networks.force import LnccForce
from patchreg.networks.integration import Integration
from patchreg.networks.padding import PadToMultiple, pad_to_multiple
from patchreg.networks.swin import SwinEncoder, SwinSize
from patchreg.types import Activations

SIZES = {
    "tiny": SwinSize(6, (2, 2, 4, 2), (2, 2, 4, 4)),
    "small": SwinSize(48, (2, 2, 4, 2), (4, 4, 4, 4)),
    "base": SwinSize(96, (2, 2, 4, 2), (4, 4, 8, 8)),
    "large": SwinSize(128, (2, 2, 12, 2), (4, 4, 8, 16)),
}
"""The sizes of the paper: 0.24, 11.8, 46.8 and 108 million parameters with the decoder."""


class TransMorph(nn.Module):
    """A Swin transformer on both images and a convolutional decoder, to a displacement or a velocity's flow.

    Any size is taken: it is padded to a multiple of 32 and cut back. At the start of training the displacement is close to
    zero. Along an axis that one window covers no windows are shifted, as in the Swin transformer.

    Args:
        size: "tiny", "small", "base" or "large", as in the paper; or widths and depths of one's own.
        window: tokens (of 4 voxels) of a window along the axes. The paper's fits 160x192x224; for cubes (6, 6, 6) does.
        channels: of each image.
        reduction: 1: the flow has full resolution; 2 or 4: a half or a quarter, made full by linear interpolation. The
            finest steps of the decoder, where most memory and time goes, are then not made.
        integration_steps: 0: the network's output is the displacement; otherwise it is a velocity, integrated by
            scaling and squaring in this many steps at the flow's resolution (TransMorph-diff; in the paper at a half).
        bspline: None, or the spacing in voxels of cubic B-spline control points, which are read off the flow and make the
            displacement, or velocity, at full resolution (TransMorph-bspl). A ``reduction`` up to the spacing loses little.
        drop_path: probability with which the last block's branches are dropped in training. None: the size's.
        force_window: 0: the network sees the two images, as in the paper. An odd number: it also sees where the gradient
            of their local correlation in such a window points (:func:`patchreg.networks.force.lncc_force`).
        memory: what is kept for the backward pass: ``"stored"``, all; ``"checkpoint"``, the inputs of blocks and
            convolutions, the same results for less memory and about a third more time; ``"reversible"``, of each level of
            a reversible network only the output.
        offload: what is kept goes to host memory.
        reversible: the transformer's blocks are reversible, on two streams; another network, to be trained from the start.

    Raises:
        InputError: options that make no network.

    References:
        Chen et al. 2022, arXiv:2111.10480, section 3 and the table of its sizes; Mangalam et al. 2022, arXiv:2302.04869, for
        reversible blocks.
    """

    def __init__(
        self,
        size: str | SwinSize = "base",
        window: Sequence[int] = (5, 6, 7),
        channels: int = 1,
        reduction: int = 1,
        integration_steps: int = 0,
        bspline: int | None = None,
        drop_path: float | None = None,
        force_window: int = 0,
        memory: Activations = "stored",
        offload: bool = False,
        reversible: bool = False,
    ) -> None:
        super().__init__()
        check_policy(memory, reversible, type(self).__name__)
        if integration_steps < 0:
            raise InputError(f"integration_steps must not be negative, got {integration_steps}")
        if force_window < 0 or (force_window and force_window % 2 == 0):
            raise InputError(f"force_window must be 0 or odd, got {force_window}")
        if reduction not in (1, 2, 4):
            raise InputError(f"reduction must be 1, 2 or 4, got {reduction}")
        if bspline is not None and bspline < 1:
            raise InputError(f"bspline must be a spacing of at least one voxel, or null for none, got {bspline}")
        images = 2 * channels + (3 if force_window else 0)
        self.encoder = SwinEncoder(images, find_size(size, drop_path), window, memory, reversible)
        self.decoder = Decoder(self.encoder.widths, images, 16, reduction, memory)
        self.reduction, self.bspline, self.offload = reduction, bspline, offload
        self.force = LnccForce(force_window) if force_window else None
        self.pad = PadToMultiple(self.encoder.multiple)
        self.integrate = Integration(integration_steps) if integration_steps else None
        self.enlarge = (
            nn.Upsample(scale_factor=reduction, mode="trilinear", align_corners=False) if reduction > 1 else None
        )

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """Displacement (B, 3, I, J, K) float32, in voxels, from two images (B, C, I, J, K)."""
        self.encoder.check_size(fixed.shape[2:])
        seen = [fixed, moving]
        if self.force is not None:
            seen.append(self.force(fixed, moving).to(fixed.dtype))
        x = self.pad(torch.cat(seen, dim=1))
        with offloading(self.offload, x.device):
            flow = self.decoder(self.encoder(x), x)
        with torch.autocast(x.device.type, enabled=False):
            if self.bspline is not None:
                flow = self._spline(flow, fixed, self.bspline)
                return flow if self.integrate is None else self.integrate(flow)
            if self.integrate is not None:
                flow = self.integrate(flow / self.reduction) * self.reduction
            if self.enlarge is not None:
                flow = self.enlarge(flow)
        return self.pad.crop(fixed, flow)

    def _spline(self, flow: Tensor, image: Tensor, spacing: int) -> Tensor:
        """The field whose control points are the flow at their places, on an image's lattice."""
        (i, j, k), cut = image.shape[2:], pad_to_multiple(image[:0], self.encoder.multiple)[1]
        shape = (i, j, k)
        affine = torch.zeros((3, 4), dtype=torch.float64, device=flow.device)
        for axis, where in enumerate(cut):
            first = where.start - spacing  # of the control points, in voxels of the padded images
            affine[axis, axis] = spacing / self.reduction
            affine[axis, 3] = (first + 0.5) / self.reduction - 0.5
        control = ops.warp(flow, affine=affine, shape=control_shape(shape, spacing), padding="border")
        return dense_bspline(control, spacing, shape)


def find_size(size: str | SwinSize, drop_path: float | None = None) -> SwinSize:
    """A size by its name in :data:`SIZES`, or as it is; with another ``drop_path`` unless that is None.

    Raises:
        InputError: an unknown name.
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise InputError(f"size must be one of {', '.join(SIZES)}, or a SwinSize, got {size!r}")
        size = SIZES[size]
    return size if drop_path is None else replace(size, drop_path=drop_path)
