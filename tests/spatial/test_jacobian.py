from __future__ import annotations

import torch
from conftest import known_transform, oriented_grid

from patchreg.spatial import Composite, DisplacementField, folding_percent, jacobian_determinant


def test_affine_determinant(oriented):
    affine = known_transform().affine_part()
    expected = float(torch.linalg.det(affine.matrix[:3, :3]))
    assert torch.allclose(jacobian_determinant(affine.on(oriented)), torch.tensor(expected, dtype=torch.float32))


def test_linear_field_has_the_determinant_of_its_matrix(oriented):
    """u(x) = G x on any grid: the determinant of I + G everywhere, whatever way the grid is stored."""
    g = torch.tensor([[0.1, 0.02, 0.0], [0.0, -0.2, 0.05], [0.03, 0.0, 0.3]], dtype=torch.float64)
    u = torch.einsum("cd,ijkd->cijk", g, oriented.points())[None].float()
    determinant = jacobian_determinant(DisplacementField(oriented, u).on(oriented))
    expected = float(torch.linalg.det(torch.eye(3) + g))
    assert torch.allclose(determinant, torch.full_like(determinant, expected), atol=1e-4)


def test_product_rule_with_an_affine():
    field, affine = known_transform().transforms
    grid = oriented_grid("LAS", (2.0, 2.0, 2.0))
    both = jacobian_determinant(Composite([field, affine]).on(grid))
    alone = jacobian_determinant(field.on(grid))
    assert torch.allclose(both, alone * torch.linalg.det(affine.matrix[:3, :3]).float(), atol=1e-4)


def test_folding_is_counted():
    grid = oriented_grid("RAS", (4.0, 4.0, 4.0))
    assert folding_percent(jacobian_determinant(known_transform(size_mm=3.0).on(grid))) == 0
    u = torch.zeros(1, 3, *grid.shape)
    u[:, 0] = -2.0 * grid.points()[..., 0].float()  # x -> -x mirrors everything
    determinant = jacobian_determinant(DisplacementField(grid, u).on(grid))
    assert folding_percent(determinant) == 100
    mask = torch.zeros_like(determinant, dtype=torch.bool)
    assert folding_percent(determinant, mask) == 0
