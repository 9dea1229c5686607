from __future__ import annotations

import gc

import torch
from cascade_parts import small_cascade

from patchreg.cascade import Prepared, PreparedPair
from patchreg.cascade.prepared import Normalization
from patchreg.memory import LivePeak
from patchreg.spatial import Grid, Volume


def training_peak(size: int) -> tuple[int, int]:
    """Peak of live bytes of a training step beyond the two images, and the bytes of the images."""
    grid = Grid.aligned((0, 0, 0), (size,) * 3, 192.0 / size)
    generator = torch.Generator().manual_seed(0)
    images = [Volume(torch.rand((1, *grid.shape), generator=generator), grid) for _ in range(2)]
    for image in images:
        image.data[:, :: size // 4] += 5
    cascade = small_cascade()
    torch.manual_seed(0)
    gc.collect()
    with LivePeak() as memory:
        pair = PreparedPair(*(Prepared(image, Normalization()) for image in images))
        for stage in (1, 2):  # levels of the pyramid are part of the images; they are made once
            spacing = min(cascade.stages[stage].lattice(pair.fixed.content, grid).spacing)
            pair.fixed.at(spacing), pair.moving.at(spacing)
        gc.collect()
        start = memory.live
        memory.peak = start
        outputs = cascade([pair])
        loss = sum(o.moved.square().mean() for o in outputs) + outputs[-1].update_mm.square().mean()
        loss.backward()
        peak = memory.peak - start
    return peak, 2 * images[0].data.nbytes


def test_training_memory_depends_on_the_patch_and_not_on_the_image():
    """An image of 27 times the voxels: the step itself takes the same memory, to a thousandth of the image."""
    small, _ = training_peak(48)
    large, images = training_peak(144)
    assert abs(large - small) < 0.02 * small
    assert small < images


def test_live_peak_counts_storages_once_and_lets_them_go():
    with LivePeak() as memory:
        a = torch.zeros(1000)
        b = a[10:]
        assert memory.live == 4000
        c = a + 1
        assert memory.live == 8000
        del a
        assert memory.live == 8000
        del b
        assert memory.live == 4000
        del c
        assert memory.live == 0
    assert memory.peak == 8000
