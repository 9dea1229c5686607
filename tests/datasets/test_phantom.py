from __future__ import annotations

import pytest
import torch

from patchreg.datasets.phantom import BRAIN_LABELS, CSF, SCALP, SKULL, phantom
from patchreg.errors import InputError
from patchreg.losses import dice
from patchreg.spatial import MappedGrid


def test_a_head_has_all_its_structures():
    head = phantom(0, 3.0)
    found = set(head.data.unique().tolist())
    assert found == {0, CSF, SKULL, SCALP, *BRAIN_LABELS}
    counts = {v: int((head.data == v).sum()) * head.grid.voxel_volume / 1000 for v in (2, 3, 41, 42)}
    assert all(100 < ml < 700 for ml in counts.values()), counts
    assert head.grid.orientation == "RAS"


def test_left_is_left():
    head = phantom(1, 3.0)
    points = head.grid.points()
    for left, right in ((3, 42), (10, 49), (17, 53)):
        assert points[head.data[0] == left][:, 0].mean() < 0 < points[head.data[0] == right][:, 0].mean()


def test_seeds_give_the_same_and_different_heads():
    assert torch.equal(phantom(3, 4.0).data, phantom(3, 4.0).data)
    a, b = phantom(3, 3.0).data, phantom(4, 3.0).data
    overlap = dice(a, b, BRAIN_LABELS)
    assert 0.1 < float(overlap.nanmean()) < 0.85  # different people, but all people


def test_a_head_keeps_its_shape_at_any_spacing():
    fine, coarse = phantom(5, 2.0), phantom(5, 4.0)
    resampled = MappedGrid.identity(coarse.grid).sample(fine, mode="nearest")[0]
    assert (
        float(dice(coarse.data, resampled, [2, 3, 41, 42, 16]).mean()) > 0.8
    )  # the cortex is less than a coarse voxel thick


def test_bad_spacing():
    with pytest.raises(InputError, match="spacing_mm"):
        phantom(0, 20.0)
