from __future__ import annotations

import pytest
import torch
from conftest import blobs, oriented_grid

from patchreg.errors import InputError
from patchreg.spatial import Grid, Pyramid, Volume, foreground
from patchreg.spatial.foreground import box_grid, otsu_threshold, percentile


def ball(grid: Grid, center, radius_mm: float) -> Volume:
    inside = (grid.points() - torch.tensor(center).double()).norm(dim=-1) < radius_mm
    return Volume(100.0 * inside.float()[None], grid, "ball")


def test_content_is_found_where_it_is_however_it_is_stored(oriented):
    found = foreground(ball(oriented, (8.0, -6.0, 4.0), 20.0))
    assert (found.center_mm - torch.tensor([8.0, -6, 4])).abs().max() < 0.5
    assert (found.low_mm - torch.tensor([-12.0, -26, -16])).abs().max() < 4
    assert (found.high_mm - torch.tensor([28.0, 14, 24])).abs().max() < 4


def test_background_of_any_value(oriented):
    image = ball(oriented, (0.0, 0.0, 0.0), 20.0)
    shifted = Volume(image.data - 1000, image.grid)  # as in CT
    a, b = foreground(image), foreground(shifted)
    assert torch.allclose(a.low_mm, b.low_mm)


def test_mask_says_where_content_is():
    grid = oriented_grid("RAS", (2.0, 2.0, 2.0))
    image, mask = blobs(grid), ball(grid, (10.0, 0.0, 0.0), 10.0)
    assert (foreground(image, mask).center_mm - torch.tensor([10.0, 0, 0])).abs().max() < 0.5
    with pytest.raises(InputError, match="is empty"):
        foreground(image, Volume(torch.zeros(1, *grid.shape), grid, "mask.nii.gz"))


def test_percentiles_agree_with_a_sort(generator):
    x = torch.randn(100_000, generator=generator).exp()
    assert abs(percentile(x, 0.5) - float(x.quantile(0.005))) < 1e-3
    assert abs(percentile(x, 99.5) - float(x.quantile(0.995))) < 2e-2
    assert abs(percentile(x, 0) - float(x.min())) < 1e-3
    assert abs(percentile(x, 100) - float(x.max())) < 1e-3
    assert percentile(torch.full((10,), 3.0), 50) == 3.0


def test_otsu_splits_two_classes(generator):
    x = torch.cat([torch.randn(5000, generator=generator), 20 + torch.randn(3000, generator=generator)])
    assert 4 < otsu_threshold(x) < 16


def test_box_grid_covers_content_and_stays_in_the_image():
    grid = oriented_grid("LPS", (2.0, 2.0, 2.0))
    content = foreground(ball(grid, (0.0, 0.0, 0.0), 20.0))
    lattice = box_grid(content, grid, 10.0, 3.0)
    low, high = lattice.bounds()
    assert bool((low <= content.low_mm - 10 + 1e-6).all())
    assert bool((high >= content.high_mm + 10 - 1e-6).all())
    assert lattice.orientation == "RAS"
    low, high = box_grid(content, grid, 1000.0, 3.0).bounds()
    assert bool((low >= grid.bounds()[0] - 3).all())
    assert bool((high <= grid.bounds()[1] + 3).all())


def test_pyramid_pools_images_and_thins_labels():
    grid = oriented_grid("RAS", (1.0, 1.0, 3.0), extent_mm=60)
    image = blobs(grid, width_mm=15.0)
    coarse = Pyramid(image).at(3.0)
    assert coarse.grid.spacing == pytest.approx((3.0, 3.0, 3.0))
    assert Pyramid(image).at(1.0) is image
    middle = coarse.grid.crop((3, 3, 3), [n - 6 for n in coarse.grid.shape])
    expected = blobs(middle, width_mm=15.0).data
    pooled = coarse.data[:, 3:-3, 3:-3, 3:-3]
    assert (pooled - expected).abs().max() < 0.02 * expected.max()
    labels = Volume((image.data * 10).int(), grid)
    thin = Pyramid(labels, labels=True).at(3.0)
    assert thin.data.dtype == torch.int32
    at = thin.grid.to_world(torch.tensor([4.0, 5, 6]))
    i, j, k = grid.to_voxel(at).round().long().tolist()
    assert thin.data[0, 4, 5, 6] == labels.data[0, i, j, k]
    assert torch.allclose(grid.to_voxel(at), grid.to_voxel(at).round())


@pytest.mark.parametrize("factors", [(2, 2, 2), (3, 3, 3), (4, 3, 2), (5, 1, 6)])
@pytest.mark.parametrize("shape", [(12, 12, 12), (13, 14, 15), (17, 11, 10), (4, 5, 3)])
def test_pooling_knows_where_its_blocks_are_and_nothing_of_storage(factors, shape):
    grid = Grid.aligned((3.0, -2, 5), shape, 2.0)
    ramp = grid.points() @ torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    pooled = Volume(ramp.float()[None], grid).pooled(factors)
    expected = pooled.grid.points() @ torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    inside = tuple(slice(1, n - 1) for n in pooled.grid.shape)
    assert torch.allclose(pooled.data[0][inside], expected[inside].float(), atol=1e-4)
    flip = torch.diag(torch.tensor([-1.0, -1, 1, 1], dtype=torch.float64))
    flip[:3, 3] = torch.tensor([shape[0] - 1.0, shape[1] - 1, 0])
    stored_otherwise = Volume(ramp.float().flip(0, 1)[None].contiguous(), Grid(shape, grid.affine @ flip)).pooled(
        factors
    )
    assert torch.allclose(stored_otherwise.data.flip(1, 2), pooled.data, atol=1e-4)
    a, b = (g.bounds() for g in (pooled.grid, stored_otherwise.grid))
    assert torch.allclose(a[0], b[0])
    assert torch.allclose(a[1], b[1])
