"""ESPCN in three dimensions: super-resolution by convolutions at low resolution and one shuffle."""

from __future__ import annotations

from torch import Tensor, nn

from patchreg.errors import InputError
from patchreg.networks.checkpointing import check_policy, run_part
from patchreg.networks.elongation import elongate
from patchreg.types import Activations


def voxel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Channels become voxels: (B, C r^3, I, J, K) to (B, C, rI, rJ, rK).

    Channel ``((c r + a) r + b) r + d`` at (i, j, k) goes to channel c at (r i + a, r j + b, r k + d).

    References:
        Shi et al. 2016, arXiv:1609.05158, eq. (4), with a third dimension.
    """
    batch, channels, i, j, k = x.shape
    r = factor
    x = x.view(batch, channels // r**3, r, r, r, i, j, k).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(batch, channels // r**3, r * i, r * j, r * k)


class ESPCN(nn.Module):
    """Three convolutions, the last of which gives every voxel the voxels that it becomes.

    With ``blocks`` it is ESPCN-RN-N: a stack of N reversible blocks before every convolution that an even number of
    channels enters. The paper's has them before all three (6, 50 and 100 channels enter); with one channel, say, there
    is none before the first. The blocks (:class:`patchreg.networks.reversible.ReversibleConvBlock` without
    normalisation) are ours: the paper's have three convolutions and batch normalisation, which fits neither patches nor
    reversing well.

    Args:
        channels: of the image. In Image Quality Transfer the six of a diffusion tensor.
        upsampling: low-resolution voxels have this many times the side of high-resolution ones.
        widths: of the two hidden layers.
        padding: False: as in the paper each kernel of side 3 takes one voxel off every border, and 11^3 voxels become
            14^3, the middle of the 22^3 that they cover. True: zeros around, for whole volumes; the same weights.
        blocks: reversible blocks in every stack. 0: the plain network.
        memory: what is kept for the backward pass: ``"stored"``, all; ``"checkpoint"``, what enters layers and blocks;
            ``"reversible"``, what stacks give. The results are the same.

    Raises:
        InputError: sizes that make no network, or ``memory: reversible`` without blocks.

    References:
        Shi et al. 2016, arXiv:1609.05158; Tanno et al. 2017, arXiv:1705.00664, section 2, for three dimensions; Blumberg
        et al. 2018, arXiv:1808.05577, figures 2 and 3, for the sizes and ESPCN-RN-N.
    """

    def __init__(
        self,
        channels: int = 6,
        upsampling: int = 2,
        widths: tuple[int, int] = (50, 100),
        padding: bool = False,
        blocks: int = 0,
        memory: Activations = "stored",
    ) -> None:
        super().__init__()
        if min(channels, *widths) < 1 or upsampling < 2 or blocks < 0:
            raise InputError(
                "ESPCN takes channels and widths from 1, upsampling from 2 and blocks from 0; got channels "
                f"{channels}, widths {tuple(widths)}, upsampling {upsampling} and blocks {blocks}"
            )
        check_policy(memory, blocks > 0, type(self).__name__)
        self.channels, self.upsampling, self.padding = channels, upsampling, padding
        first, second = widths
        sizes = [(channels, first, 3), (first, second, 1), (second, channels * upsampling**3, 3)]
        convs = [nn.Conv3d(a, b, side, padding=side // 2 if padding else 0) for a, b, side in sizes]
        self.layers = nn.Sequential(*(nn.Sequential(conv, nn.ReLU(inplace=True)) for conv in convs[:2]), convs[2])
        self.memory: Activations = "stored" if blocks else memory  # layers after a stack have its policy already
        if blocks:
            even = [f"layers.{index}" for index, (enter, _, _) in enumerate(sizes) if enter % 2 == 0]
            elongate(self, blocks, even, memory, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, I, J, K) to (B, C, r(I - 4), r(J - 4), r(K - 4)), or with padding to (B, C, rI, rJ, rK)."""
        smallest = 1 if self.padding else 5
        if x.dim() != 5 or x.shape[1] != self.channels or min(x.shape[2:]) < smallest:
            raise InputError(
                f"ESPCN takes images (B, {self.channels}, I, J, K) of at least {smallest} voxels a side, got "
                f"{tuple(x.shape)}"
            )
        for layer in self.layers:
            x = run_part(self.memory, layer, x)
        return voxel_shuffle(x, self.upsampling)
