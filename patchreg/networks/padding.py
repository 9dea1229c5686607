"""Images made large enough for a network's strides."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from patchreg.types import Shape3


class PadToMultiple(nn.Module):
    """Zeros around images, evenly, until their sizes are multiples; and what was there cut out again.

    Args:
        multiple: of voxels.
    """

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def extra_repr(self) -> str:
        return f"multiple={self.multiple}"

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, I, J, K) to the padded images."""
        return pad_to_multiple(x, self.multiple)[0]

    def crop(self, image: Tensor, x: Tensor) -> Tensor:
        """Of a volume on the padded lattice the part where an image lies.

        Args:
            image: (B, C, I, J, K), before it was padded; only its shape counts.
            x: (B, c, ...), of the size of the padded images.

        Returns:
            (B, c, I, J, K).
        """
        i, j, k = pad_to_multiple(image[:0], self.multiple)[1]
        return x[:, :, i, j, k]


def pad_to_multiple(x: Tensor, multiple: int | Shape3) -> tuple[Tensor, tuple[slice, slice, slice]]:
    """Pad (B, C, I, J, K) evenly with zeros to multiples, and the slices that cut the original out again.

    Args:
        x: images.
        multiple: of voxels, along every axis or along each.
    """
    padding: list[int] = []
    cut = []
    for size, of in zip(x.shape[2:], (multiple,) * 3 if isinstance(multiple, int) else multiple, strict=True):
        extra = -size % of
        padding = [extra // 2, extra - extra // 2, *padding]
        cut.append(slice(extra // 2, extra // 2 + size))
    return (F.pad(x, padding) if any(padding) else x), (cut[0], cut[1], cut[2])
