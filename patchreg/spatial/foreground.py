"""What of an image is not background, and where it lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchreg.errors import InputError
from patchreg.spatial.grid import Grid
from patchreg.spatial.volume import Volume

BINS = 256
CONTENT_VOXELS = 2**18


def histogram(values: Tensor, low: float, high: float, bins: int = BINS) -> Tensor:
    """Counts (bins,) float64 of ``values`` between ``low`` and ``high``, on the CPU."""
    counts = torch.histc(values.to(torch.float32), bins=bins, min=low, max=high)
    return counts.to("cpu", torch.float64)


def percentile(values: Tensor, percent: float) -> float:
    """A percentile of any number of values, from histograms: no sort and no copy, and no order of the voxels.

    A second histogram resolves the bin that the percentile falls into, so the error is the range over 2**24.

    Args:
        values: any shape, finite.
        percent: from 0 to 100.
    """
    low, high = (float(v) for v in torch.aminmax(values))
    fine = 4096
    below, rank = 0.0, 0.0
    for level in range(2):
        if low == high:
            return low
        counts = histogram(values, low, high, fine).cumsum(0)
        if level == 0:
            rank = percent / 100 * float(counts[-1])
        found = min(int(torch.searchsorted(counts, max(rank - below, 0.0))), fine - 1)
        below += float(counts[found - 1]) if found else 0.0
        low, high = low + (high - low) * found / fine, low + (high - low) * (found + 1) / fine
    return (low + high) / 2


def otsu_threshold(values: Tensor) -> float:
    """The intensity that splits values into two classes of the largest variance between them.

    References:
        Otsu 1979, doi:10.1109/TSMC.1979.4310076, eq. (18).
    """
    low, high = float(values.min()), percentile(values, 99.5)
    if low == high:
        return low
    counts = histogram(values.clamp(low, high), low, high)
    centers = torch.linspace(low, high, 2 * BINS + 1, dtype=torch.float64)[1::2]
    weight = counts.cumsum(0)
    mean = (counts * centers).cumsum(0)
    total, overall = weight[-1], mean[-1]
    between = (overall * weight - total * mean).square() / (weight * (total - weight)).clamp(min=1)
    best = (between[:-1] >= between[:-1].max() * (1 - 1e-9)).nonzero().double().mean()  # the middle of an empty gap
    return low + (high - low) * (float(best) + 1) / BINS


@dataclass(frozen=True)
class Foreground:
    """Where the content of an image lies in the world.

    Args:
        center_mm: (3,), its centre of mass, every foreground voxel of equal weight.
        low_mm: (3,), lowest world coordinates of its box.
        high_mm: (3,), highest.
    """

    center_mm: Tensor
    low_mm: Tensor
    high_mm: Tensor


def content_threshold(values: Tensor) -> float:
    """What is brighter is content: halfway from the darkest value to Otsu's threshold."""
    low = float(values.min())
    return low + 0.5 * (otsu_threshold(values) - low)


def foreground(
    volume: Volume, mask: Volume | None = None, trim: float = 0.002, threshold: float | None = None
) -> Foreground:
    """The box and centre of an image's content, found in the world and so the same however the image is stored.

    Content is what is brighter than :func:`content_threshold`, or what ``mask`` selects; found on a copy of about a
    quarter of a million voxels.

    Args:
        volume: the image, any channels; the first counts.
        mask: where to look, on a grid of its own.
        trim: fraction of the content that may lie outside the box, on each side along each world axis.
        threshold: the content's threshold where it is known already.

    Raises:
        InputError: the mask selects nothing.
    """
    chosen = mask if mask is not None else volume
    small = chosen.thumbnail(CONTENT_VOXELS)
    if mask is None:
        selected = small.data[0] > (content_threshold(small.data[0]) if threshold is None else threshold)
    else:
        selected = small.data[0] > 0
    index = selected.nonzero().cpu()
    if index.shape[0] == 0:
        if mask is not None:
            raise InputError(f"{mask.name or 'the mask'} is empty: no voxel is selected")
        low_mm, high_mm = volume.grid.bounds()
        return Foreground(volume.grid.center, low_mm, high_mm)
    points = small.grid.to_world(index)
    half = small.grid.linear.abs().sum(dim=1) / 2
    cut = int(trim * points.shape[0])
    low_mm = points.kthvalue(1 + cut, dim=0).values
    high_mm = points.kthvalue(points.shape[0] - cut, dim=0).values
    return Foreground(points.mean(dim=0), low_mm - half, high_mm + half)


def box_grid(content: Foreground, within: Grid, margin_mm: float, spacing: float | tuple[float, float, float]) -> Grid:
    """A world-aligned lattice of ``spacing`` over a box with a margin, cut to the box of the grid ``within``."""
    low, high = within.whole.bounds()
    low = torch.maximum(content.low_mm - margin_mm, low)
    high = torch.minimum(content.high_mm + margin_mm, high)
    step = torch.as_tensor(spacing, dtype=torch.float64).expand(3)
    shape = torch.ceil((high - low) / step - 1e-6).clamp(min=1).to(torch.int64).tolist()
    return Grid.aligned((low + high) / 2, shape, spacing)
