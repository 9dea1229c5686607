from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import blobs, known_transform, oriented_grid

from patchreg.errors import GeometryError, GridMismatch
from patchreg.spatial import Affine, Composite, DisplacementField, Grid, MappedGrid, VelocityField


def points(generator, count=200, half_mm=35.0):
    return half_mm * (2 * torch.rand((count, 3), generator=generator, dtype=torch.float64) - 1)


def test_a_point_and_a_grid_go_the_same_way(oriented, tolerances):
    transform = known_transform()
    mapped = transform.on(oriented)
    dense = oriented.points() + mapped.total_displacement_mm()[0].permute(1, 2, 3, 0)
    assert (transform(oriented.points()) - dense).abs().max() < tolerances.points_mm


def test_the_same_transform_on_any_storage(tolerances):
    """A point that several grids share goes to one place, whatever the grid it is asked through."""
    transform = known_transform()
    found = []
    for orientation in ("RAS", "LAS", "LPS", "LIA", "oblique"):
        grid = oriented_grid(orientation, (2.0, 2.0, 2.0))
        around = grid.crop((0, 0, 0), (3, 3, 3))  # moved so that its middle voxel is the world's (5, -7, 9)
        shift = torch.eye(4, dtype=torch.float64)
        shift[:3, 3] = torch.tensor([5.0, -7, 9]) - around.center
        mapped = transform.on(around.moved(shift))
        found.append(torch.tensor([5.0, -7, 9]) + mapped.total_displacement_mm()[0, :, 1, 1, 1])
    for other in found[1:]:
        assert (other - found[0]).abs().max() < tolerances.points_mm


def test_composite_applies_the_first_first(generator, tolerances):
    shift, double = Affine.translation((1.0, 0, 0)), Affine(torch.diag(torch.tensor([2.0, 2, 2, 1])))
    x = points(generator)
    assert torch.allclose(Composite([shift, double])(x), 2 * (x + torch.tensor([1.0, 0, 0])))
    field, affine = known_transform().transforms
    assert (Composite([field, affine])(x) - affine(field(x))).abs().max() < tolerances.points_mm
    assert len(Composite([Composite([field]), Composite([affine])]).transforms) == 2


def test_chain_on_a_grid_is_the_chain_of_points(oriented, tolerances):
    chain = Composite([known_transform(1), known_transform(2), known_transform(3)])
    mapped = chain.on(oriented)
    dense = oriented.points() + mapped.total_displacement_mm()[0].permute(1, 2, 3, 0)
    one_by_one = known_transform(3)(known_transform(2)(known_transform(1)(oriented.points())))
    assert (dense - one_by_one).abs().max() < 5 * tolerances.points_mm


def test_translation_in_mm_is_a_translation_in_mm(oriented):
    """Voxel sizes and orientation play no part: an image moved by 4 mm samples its formula 4 mm further."""
    shift = torch.tensor([4.0, -3.0, 2.0])
    moving = blobs(oriented_grid("LPS", (1.5, 2.0, 1.0)))
    target = blobs(oriented.moved(Affine.translation(shift).matrix))
    moved = Affine.translation(shift).on(oriented).sample(moving)[0]
    inside = (
        Affine.translation(shift)
        .on(oriented)
        .inside(moving.grid.crop((2, 2, 2), [n - 4 for n in moving.grid.shape]))[0]
    )
    assert (moved - target.data)[inside].abs().max() < 0.02 * target.data.max()


def test_images_are_interpolated_once(oriented):
    """A shift there and back is the identity: nothing is blurred in between."""
    image = blobs(oriented, width_mm=3.0)
    there_and_back = Composite([Affine.translation((0.9, 0.9, 0.9)), Affine.translation((-0.9, -0.9, -0.9))])
    assert torch.allclose(there_and_back.on(oriented).sample(image)[0], image.data, atol=1e-4 * float(image.data.max()))


def test_a_field_on_its_own_grid_is_exact(generator):
    grid = oriented_grid("oblique", (3.0, 3.0, 3.0))
    u = torch.randn((1, 3, *grid.shape), generator=generator)
    assert DisplacementField(grid, u).on(grid).displacement_mm is u


def test_padding_of_fields():
    grid = Grid.aligned((0, 0, 0), (5, 5, 5), 2.0)
    u = torch.ones(1, 3, 5, 5, 5)
    far = torch.tensor([[50.0, 0, 0]], dtype=torch.float64)
    assert torch.allclose(DisplacementField(grid, u)(far), far + 1.0)
    assert torch.allclose(DisplacementField(grid, u, padding="zeros")(far), far)


def test_velocity_field_is_inverted_by_its_negative(generator, tolerances):
    field = known_transform(size_mm=6.0, affine=False).transforms[0]
    flow = VelocityField(field.grid, field.displacement_mm)
    x = points(generator)
    away = (flow.inverse()(flow(x)) - x).norm(dim=1).max()
    assert away < tolerances.flow_inverse_voxels * field.grid.spacing[0]
    assert (flow(x) - x).norm(dim=1).max() > 3


def test_resampled_field_is_the_same_field(generator):
    field = known_transform(affine=False).transforms[0]
    finer = field.resampled(field.grid.with_spacing(2.0))
    x = points(generator, half_mm=30)
    assert (finer(x) - field(x)).norm(dim=1).max() < 0.15  # a linear interpolation of a linear interpolation
    same = field.resampled(field.grid)
    assert torch.equal(same.displacement_mm, field.displacement_mm)


def test_gradients_reach_matrix_and_field(generator):
    field, _ = known_transform().transforms
    matrix = torch.eye(4, dtype=torch.float64).requires_grad_()
    u = field.displacement_mm.clone().requires_grad_()
    grid = oriented_grid("LAS", (4.0, 4.0, 4.0))
    image = blobs(oriented_grid("RAS", (2.0, 2.0, 2.0)))
    Composite([DisplacementField(field.grid, u), Affine(matrix)]).on(grid).sample(image).square().mean().backward()
    assert matrix.grad[:3].abs().min() > 0
    assert u.grad.abs().sum() > 0
    eps = 1e-3
    values = []
    for sign in (1, -1):
        nudged = torch.eye(4, dtype=torch.float64)
        nudged[0, 3] += sign * eps
        mapped = Composite([DisplacementField(field.grid, u.detach()), Affine(nudged)]).on(grid)
        values.append(mapped.sample(image).double().square().mean())
    slope = (values[0] - values[1]) / (2 * eps)
    assert abs(float(slope - matrix.grad[0, 3])) < 0.02 * abs(float(slope))


def test_rigid_part_of_an_affine(generator):
    affine = known_transform().affine_part()
    rigid = affine.rigid_at(torch.tensor([3.0, 4, 5]))
    rotation = rigid.matrix[:3, :3]
    assert torch.allclose(rotation @ rotation.T, torch.eye(3).double())
    assert abs(float(torch.linalg.det(rotation)) - 1) < 1e-9
    center = torch.tensor([[3.0, 4, 5]])
    assert torch.allclose(rigid(center), affine(center))
    with pytest.raises(GeometryError, match="mirrors"):
        Affine(torch.diag(torch.tensor([-1.0, 1, 1, 1]))).rigid_at(torch.zeros(3))


def test_inside_tells_where_there_is_an_image():
    grid = Grid.aligned((0, 0, 0), (10, 4, 4), 1.0)
    inside = Affine.translation((3.0, 0, 0)).on(grid).inside(grid)
    assert inside[0, 0, :7].all()
    assert not inside[0, 0, 7:].any()


def test_mismatched_fields_are_refused():
    grid = Grid.aligned((0, 0, 0), (4, 5, 6), 1.0)
    with pytest.raises(GridMismatch, match="move the components to dim 1"):
        DisplacementField(grid, torch.zeros(1, 4, 5, 6, 3))
    with pytest.raises(GridMismatch, match="to match the grid"):
        MappedGrid(grid, torch.eye(4), torch.zeros(1, 3, 4, 5, 7))
    with pytest.raises(GeometryError, match="singular"):
        Affine(torch.diag(torch.tensor([1.0, 1, 0, 1])))


def test_points_may_be_arrays_or_lists():
    transform = known_transform()
    given = np.array([[1.0, 2.0, 3.0], [-4.0, 5.0, 6.0]])
    expected = transform(torch.from_numpy(given))
    assert torch.equal(transform(given), expected)
    assert torch.equal(transform(given.tolist()), expected)
    assert torch.allclose(transform(given[0]), expected[0], atol=1e-4)
