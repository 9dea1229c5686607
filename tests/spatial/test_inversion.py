from __future__ import annotations

import torch
from conftest import known_transform, oriented_grid

from patchreg.spatial import Affine, Composite, DisplacementField, Grid, inverse_field, invert


def test_inverse_of_a_field_and_an_affine(oriented, tolerances):
    transform = known_transform(size_mm=6.0)
    found = invert(transform, oriented)
    assert found.residual_mean_mm < tolerances.inverse_mm / 4
    back = oriented.points() + found.displacement_mm[0].permute(1, 2, 3, 0)
    away = transform(back) - oriented.points()
    assert away.norm(dim=-1).quantile(0.999) < tolerances.inverse_mm
    assert abs(float(away.norm(dim=-1).max()) - found.residual_max_mm) < 1e-3


def test_inverse_of_an_affine_map_is_exact():
    grid = oriented_grid("LPS", (5.0, 5.0, 5.0))
    affine = known_transform().affine_part()
    found = invert(affine, grid)
    assert found.iterations == 1
    back = grid.points() + found.displacement_mm[0].permute(1, 2, 3, 0)
    assert (back - affine.inverse()(grid.points())).abs().max() < 1e-4


def test_fine_grids_start_from_coarse_ones(tolerances):
    transform = known_transform(size_mm=6.0)
    fine = oriented_grid("RAS", (1.5, 1.5, 1.5))
    found = invert(transform, fine, coarse_mm=4.0)
    assert found.iterations <= 4
    assert found.residual_mean_mm < tolerances.inverse_mm


def test_a_folded_transform_reports_that_it_has_no_inverse():
    field = known_transform(size_mm=60.0, affine=False).transforms[0]
    _, found = inverse_field(
        Composite([DisplacementField(field.grid, field.displacement_mm), Affine.identity()]), field.grid
    )
    assert found.residual_max_mm > 0.5
    assert torch.isfinite(found.displacement_mm).all()


def test_slab_by_slab(monkeypatch):
    """A grid that is solved in parts has the same inverse."""
    from patchreg.spatial import inversion

    grid = Grid.aligned((0, 0, 0), (41, 31, 21), (3.0, 3.5, 4.0))
    whole = invert(known_transform(), grid)
    monkeypatch.setattr(inversion, "AT_ONCE", 8 * 31 * 21)
    parts = invert(known_transform(), grid)
    assert (parts.displacement_mm - whole.displacement_mm).norm(dim=1).max() < 0.02
    assert parts.residual_max_mm < 0.05
    assert abs(parts.residual_mean_mm - whole.residual_mean_mm) < 5e-3
