from __future__ import annotations

import pytest
import torch
from inference_parts import brain_points, head, head_grid, known_pair

from patchreg.cascade import Prepared
from patchreg.cascade.prepared import Normalization
from patchreg.errors import InputError
from patchreg.inference.refine import Refinement, refine_affine, refine_deformable, similarity
from patchreg.losses import target_error_mm
from patchreg.ops.windows import gaussian_smooth
from patchreg.spatial import (
    Affine,
    Composite,
    DisplacementField,
    Volume,
    deformable_part,
    folding_percent,
    jacobian_determinant,
)

CPU = torch.device("cpu")


def ready(*volumes: Volume) -> list[Prepared]:
    return [Prepared(v, Normalization()) for v in volumes]


def test_affine_refinement_finds_a_known_affine():
    grid = head_grid("RAS", (3.0, 3.0, 3.0))
    fixed, moving, truth = known_pair(grid, grid, size_mm=0.001)
    prepared = ready(fixed, moving)
    settings = Refinement()
    points = brain_points()
    found = refine_affine(*prepared, Affine.identity(), settings, False, CPU)
    before = target_error_mm(Affine.identity(), points, truth(points)).mean()
    after = target_error_mm(found, points, truth(points)).mean()
    assert before > 3
    assert after < 0.6
    rigid = refine_affine(*prepared, Affine.identity(), settings, True, CPU).matrix[:3, :3]
    assert torch.allclose(rigid @ rigid.T, torch.eye(3).double(), atol=1e-9)
    start = similarity(*prepared, Affine.identity(), settings, 4.0)
    assert similarity(*prepared, found, settings, 4.0) > start + 0.2


@pytest.mark.parametrize(("similarity_name", "limit"), [("lncc", 0.6), ("mi", 1.2)])
def test_deformable_refinement_finds_a_known_displacement(similarity_name, limit):
    grid = head_grid("RAS", (3.0, 3.0, 3.0))
    fixed, moving, truth = known_pair(grid, head_grid("LPS", (3.0, 3.0, 3.0)), size_mm=12.0)
    affine = truth.affine_part()
    settings = Refinement(
        similarity=similarity_name, spacings_mm=(5.0, 3.0), regularity=0.2 if similarity_name == "lncc" else 0.05
    )
    found = refine_deformable(*ready(fixed, moving), affine, settings, CPU)
    points = brain_points()
    before = target_error_mm(affine, points, truth(points)).mean()
    after = target_error_mm(found, points, truth(points)).mean()
    assert before > 1.5
    assert after < limit
    assert folding_percent(jacobian_determinant(found.on(grid))) < 0.1


def test_refinement_starts_from_what_is_there():
    """No iterations: the transform comes back as it was, written anew."""
    grid = head_grid("RAS", (4.0, 4.0, 4.0))
    fixed, moving, truth = known_pair(grid, grid)
    settings = Refinement(spacings_mm=(3.0,), iterations=(0,))
    same = refine_deformable(*ready(fixed, moving), truth, settings, CPU)
    points = brain_points(500)
    assert (same(points) - truth(points)).norm(dim=1).max() < 0.3
    u, affine = deformable_part(truth, grid)
    mapped = truth.on(grid)
    assert torch.allclose(affine.matrix, mapped.matrix)
    again = Composite([Affine.identity()]).on(grid)
    assert again.displacement_mm is None
    assert u.shape == (1, 3, *grid.shape)


def test_masks_say_where_similarity_counts():
    """A lesion that only one image has draws the transform unless it is masked."""
    grid = head_grid("RAS", (4.0, 4.0, 4.0))
    fixed, moving, truth = known_pair(grid, grid)
    ball = (grid.points() - torch.tensor([25.0, 0, 20])).norm(dim=-1) < 16
    damaged = Volume(torch.where(ball, 1500.0, fixed.data[0])[None], grid, "fixed")
    mask = Volume((~ball).float()[None], grid, "mask")
    settings = Refinement(spacings_mm=(4.0,), iterations=(40,), regularity=0.2)
    near = brain_points()
    near = near[((near - torch.tensor([25.0, 0, 20])).norm(dim=1) - 16).abs() < 8]
    errors = []
    for given in (None, mask):
        prepared = Prepared(damaged, Normalization(), mask=given)
        found = refine_deformable(prepared, *ready(moving), truth.affine_part(), settings, CPU)
        errors.append(float(target_error_mm(found, near, truth(near)).mean()))
    assert errors[1] < 0.9 * errors[0]


def test_bad_settings():
    with pytest.raises(InputError, match="similarity must be"):
        Refinement(similarity="ssd")
    with pytest.raises(InputError, match="one number of iterations"):
        Refinement(spacings_mm=(4.0,), iterations=(1, 2))


def test_refinement_keeps_what_is_finer_than_its_levels(generator):
    """A field of 2 mm with detail that a lattice of 5 mm cannot hold comes through a level of 5 mm."""
    grid = head_grid("RAS", (2.0, 2.0, 2.0))
    image, _ = head(spacing_mm=2.0)
    detail = 3 * gaussian_smooth(torch.randn((1, 3, *grid.shape), generator=generator), (1.0,) * 3)
    start = Composite([DisplacementField(grid, detail)])
    same = refine_deformable(*ready(image, image), start, Refinement(spacings_mm=(5.0,), iterations=(0,)), CPU)
    points = brain_points(500)
    moved = (start(points) - points).norm(dim=1).mean()
    assert (same(points) - start(points)).norm(dim=1).mean() < 0.2 * moved
