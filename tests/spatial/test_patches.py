from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from patchreg.errors import InputError
from patchreg.spatial import Grid
from patchreg.spatial.patches import Blend, cover, tile, window


@given(
    length=st.integers(1, 300), patch=st.integers(1, 80), overlap=st.floats(0, 0.9), seed=st.integers(0, 9) | st.none()
)
def test_patches_cover_everything(length, patch, overlap, seed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    if patch > length:
        with pytest.raises(InputError, match="does not fit"):
            cover(length, patch, overlap, generator)
        return
    starts = cover(length, patch, overlap, generator)
    seen = torch.zeros(length)
    for start in starts:
        assert 0 <= start <= length - patch
        seen[start : start + patch] += 1
    assert bool((seen > 0).all())


def test_regular_patches_overlap_as_asked():
    starts = cover(100, 40, 0.25)
    assert starts == [0, 30, 60]
    assert all(b - a <= 30 for a, b in itertools.pairwise(starts))


def test_random_patches_differ_every_time(generator):
    draws = {tuple(tile((100, 90, 27), (40, 40, 16), 0.25, generator)) for _ in range(5)}
    assert len(draws) == 5
    assert tuple(tile((100, 90, 27), (40, 40, 16), 0.25)) not in draws


def test_blend_of_one_field_is_the_field(generator):
    """A partition of unity: patches that agree give back what they agree on, and no spread."""
    grid = Grid.aligned((0, 0, 0), (20, 18, 16), 1.0)
    field = torch.randn((1, 3, *grid.shape), generator=generator)
    blend = Blend.empty(grid)
    shape = (8, 8, 8)
    for start in tile(grid.shape, shape, 0.25):
        i, j, k = (slice(s, s + n) for s, n in zip(start, shape, strict=True))
        blend.add(start, field[:, :, i, j, k], window(shape))
    assert torch.allclose(blend.mean_mm(), field, atol=1e-5)
    assert blend.spread_mm().max() < 0.02


def test_spread_is_the_disagreement():
    grid = Grid.aligned((0, 0, 0), (4, 4, 4), 1.0)
    blend = Blend.empty(grid)
    for value in (1.0, 3.0):
        u = torch.zeros(1, 3, 4, 4, 4)
        u[:, 1] = value
        blend.add((0, 0, 0), u, torch.ones(1, 1, 4, 4, 4))
    assert torch.allclose(blend.mean_mm()[:, 1], torch.tensor(2.0))
    assert torch.allclose(blend.spread_mm(), torch.tensor(1.0))


def test_blend_has_no_seams():
    """Two overlapping patches with different constants: the blend rises smoothly, without a jump."""
    grid = Grid.aligned((0, 0, 0), (48, 4, 4), 1.0)
    blend = Blend.empty(grid)
    for start, value in ((0, 0.0), (16, 1.0)):
        blend.add((start, 0, 0), torch.full((1, 3, 32, 4, 4), value), window((32, 4, 4)))
    profile = blend.mean_mm()[0, 0, :, 2, 2]
    assert profile[0] == 0
    assert profile[-1] == 1
    assert profile.diff().max() < 0.2
