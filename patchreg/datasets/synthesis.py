"""Images made from label maps: random contrast, bias field, blur, resolution and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchreg.errors import InputError
from patchreg.ops.windows import gaussian_smooth
from patchreg.spatial import Volume
from patchreg.types import Shape3


@dataclass(frozen=True)
class Synthesis:
    """Ranges from which images are made of label maps.

    Args:
        groups: label values that always share an intensity, such as left and right; all others have their own.
        content: label values that stay when the rest is stripped away (a skull-stripped brain). None: never strip.
        strip_probability: how often it is.
        same_contrast_probability: how often both images of a pair share their contrast.
        texture: largest standard deviation within a label, as a fraction of the intensity range.
        background_probability: how often label 0 has an intensity of its own; otherwise it is zero.
        bias: largest log amplitude of the bias field.
        bias_points: largest number of control points of the bias field along a dimension.
        blur_mm: largest standard deviation of the blur.
        thickness_mm: largest slice thickness.
        thick_probability: how often one dimension has thick slices.
        noise: largest standard deviation of the noise added last, as a fraction of the range.
        gamma: largest log exponent of a change of contrast.
        crop: largest fraction cut off each side of the field of view.

    Raises:
        InputError: a probability outside 0..1 or a negative range.

    References:
        Billot et al. 2023 (SynthSeg), arXiv:2107.09559, sec. 3; Hoffmann et al. 2022 (SynthMorph), arXiv:2004.10282.
    """

    groups: Sequence[Sequence[int]] = ()
    content: Sequence[int] | None = None
    strip_probability: float = 0.3
    same_contrast_probability: float = 0.5
    texture: float = 0.08
    background_probability: float = 0.2
    bias: float = 0.4
    bias_points: int = 5
    blur_mm: float = 1.0
    thickness_mm: float = 4.0
    thick_probability: float = 0.2
    noise: float = 0.06
    gamma: float = 0.3
    crop: float = 0.0

    def __post_init__(self) -> None:
        chances = (
            self.strip_probability, self.same_contrast_probability, self.background_probability, self.thick_probability,
        )  # fmt: skip
        ranges = (self.texture, self.bias, self.blur_mm, self.noise, self.gamma, self.crop, self.thickness_mm)
        if min(chances) < 0 or max(chances) > 1 or min(ranges) < 0 or self.crop >= 0.5 or self.bias_points < 2:
            raise InputError("synthesis: probabilities run from 0 to 1, ranges from 0 up, crop to below 0.5")

    def draw_contrast(self, largest: int, generator: torch.Generator) -> Tensor:
        """A random mean intensity from 0 to 1 for every label value up to ``largest``: (largest + 1,)."""
        means = torch.rand(largest + 1, generator=generator)
        for group in self.groups:
            known = [v for v in group if v <= largest]
            if known:
                means[known] = means[known[0]].clone()
        if float(torch.rand(1, generator=generator)) >= self.background_probability:
            means[0] = 0
        else:
            means[0] *= 0.3
        return means

    def draw_pair(self, largest: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The contrasts of a pair: sometimes the same, up to a little jitter, sometimes unrelated."""
        first = self.draw_contrast(largest, generator)
        if float(torch.rand(1, generator=generator)) >= self.same_contrast_probability:
            return first, self.draw_contrast(largest, generator)
        jitter = 0.02 * torch.randn(first.shape, generator=generator)
        return first, torch.where(first > 0, first + jitter, first).clamp(0, 1)

    def draw_strip(self, generator: torch.Generator) -> bool:
        """Whether the image shows the content alone."""
        chosen = float(torch.rand(1, generator=generator)) < self.strip_probability
        return chosen and self.content is not None

    def make(self, labels: Volume, contrast: Tensor, strip: bool, generator: torch.Generator) -> Volume:
        """An image of a label map.

        Args:
            labels: (1, I, J, K) integers from 0 up.
            contrast: mean intensity of every label value, (largest + 1,).
            strip: show the content alone.
            generator: of everything random.

        Returns:
            (1, i, j, k) float32 on a grid of its own: cropped, and thicker along one dimension, at random.
        """

        def uniform(limit: float) -> float:
            return limit * float(torch.rand(1, generator=generator))

        means = contrast.clone()
        if strip and self.content is not None:
            kept = torch.zeros_like(means, dtype=torch.bool)
            kept[[v for v in self.content if v < means.numel()]] = True
            means = torch.where(kept, means, 0.0)
        labels = _crop(labels, self.crop, generator)
        index = labels.data.flatten().to(torch.int32)
        texture = torch.where(means > 0, self.texture * torch.rand(means.shape, generator=generator), 0.0)
        image = torch.randn(index.shape, generator=generator)
        image = image.mul_(texture.index_select(0, index)).add_(means.index_select(0, index)).view(labels.data.shape)
        image = gaussian_smooth(image[None], _voxels(labels, uniform(self.blur_mm)), truncate=2.0)
        image = image.mul_(self._bias_field(labels.grid.shape, generator)).clamp_(min=0)
        volume = self._thicken(Volume(image[0], labels.grid, labels.name), generator)
        data = volume.data
        exponent = torch.exp(torch.tensor(self.gamma * (2 * uniform(1.0) - 1))).item()
        data = (data / data.max().clamp(min=1e-6)).pow(exponent)
        noise = torch.randn(data.shape, generator=generator).mul_(uniform(self.noise))
        return Volume(data.add_(noise).clamp_(min=0), volume.grid, labels.name)

    def _bias_field(self, shape: Shape3, generator: torch.Generator) -> Tensor:
        points = torch.randint(2, self.bias_points + 1, (3,), generator=generator).tolist()
        amplitude = self.bias * float(torch.rand(1, generator=generator))
        low = amplitude * (2 * torch.rand((1, 1, *points), generator=generator) - 1)
        return F.interpolate(low, size=shape, mode="trilinear", align_corners=True).exp_()

    def _thicken(self, volume: Volume, generator: torch.Generator) -> Volume:
        if float(torch.rand(1, generator=generator)) >= self.thick_probability:
            return volume
        dim = int(torch.randint(3, (1,), generator=generator))
        thickness = self.thickness_mm * float(torch.rand(1, generator=generator))
        factor = max(1, round(thickness / volume.grid.spacing[dim]))
        factors: list[int] = [1, 1, 1]
        factors[dim] = min(factor, volume.grid.shape[dim] // 2)
        return volume.pooled((factors[0], factors[1], factors[2]))


def _voxels(volume: Volume, sigma_mm: float) -> tuple[float, float, float]:
    i, j, k = (sigma_mm / s for s in volume.grid.spacing)
    return (i, j, k)


def _crop(labels: Volume, largest: float, generator: torch.Generator) -> Volume:
    if largest == 0:
        return labels
    cut = (largest * torch.rand((3, 2), generator=generator)).tolist()
    start = [int(n * low) for n, (low, _) in zip(labels.grid.shape, cut, strict=True)]
    stop = [n - int(n * high) for n, (_, high) in zip(labels.grid.shape, cut, strict=True)]
    i, j, k = (slice(a, b) for a, b in zip(start, stop, strict=True))
    data = labels.data[:, i, j, k]
    return Volume(data, labels.grid.crop(start, data.shape[1:]), labels.name)


def crop_to_content(labels: Volume, margin: int = 4) -> Volume:
    """The label map cut to the box of what is not zero, with a margin in voxels.

    Raises:
        InputError: there is nothing but zero.
    """
    found = labels.data[0] > 0
    ranges = []
    for dim in range(3):
        others = [d for d in range(3) if d != dim]
        used = found.amax(dim=others).nonzero()
        if used.numel() == 0:
            raise InputError(f"{labels.name or 'the label map'}: has no label but zero")
        ranges.append((max(0, int(used.min()) - margin), min(found.shape[dim], int(used.max()) + 1 + margin)))
    i, j, k = (slice(a, b) for a, b in ranges)
    data = labels.data[:, i, j, k].contiguous()
    return Volume(data, labels.grid.crop([a for a, _ in ranges], data.shape[1:]), labels.name)
