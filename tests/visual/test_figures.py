from __future__ import annotations

import numpy as np
import torch
from conftest import known_transform, oriented_grid

from patchreg.spatial import Affine, Composite, Grid, Volume, foreground
from patchreg.visual import columns_figure, pixels, planes, png, registration_figure
from patchreg.visual.figures import checkerboard, normalized
from patchreg.visual.planes import log_jacobian, mapped_mm, picture


def content():
    grid = Grid.aligned((0, 0, 0), (40, 40, 40), 2.0)
    inside = grid.points().norm(dim=-1) < 30
    return foreground(Volume(inside.float()[None], grid))


def test_pictures_show_the_world_however_the_image_is_stored(oriented):
    """Brightness rises to the right, by a lot to the front and by most to the top."""
    x, y, z = oriented.points().unbind(-1)
    image = Volume((x + 2 * y + 4 * z + 1000).float()[None], oriented)
    for plane in planes(content()):
        shown = picture(image, Affine.identity(), plane)
        inner = shown[40:-40, 40:-40]
        step_up, step_right = np.diff(inner, axis=0).mean(), np.diff(inner, axis=1).mean()
        weight = (1, 2, 4)
        mm = float(plane.grid.spacing[plane.axes[0]])
        assert abs(step_right / mm - weight[plane.axes[0]]) < 1e-2
        assert abs(step_up / mm - weight[plane.axes[1]]) < 1e-2


def test_maps_on_planes_follow_the_transform():
    scaling = Affine(torch.diag(torch.tensor([1.5, 1.0, 1.0, 1.0], dtype=torch.float64)))
    axial = planes(content())[0]
    x, y = mapped_mm(scaling, axial)
    assert np.allclose(np.diff(x, axis=1) / float(axial.grid.spacing[0]), 1.5, atol=1e-4)
    assert np.allclose(np.diff(y, axis=0) / float(axial.grid.spacing[1]), 1.0, atol=1e-4)
    assert np.allclose(log_jacobian(scaling, axial), np.log(1.5), atol=1e-5)
    mirrored = Affine(torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64)))
    assert np.isnan(log_jacobian(mirrored, axial)).all()


def test_a_figure_has_a_column_for_everything():
    grid = oriented_grid("LPS", (4.0, 4.0, 4.0))
    image = Volume(torch.rand((1, *grid.shape), generator=torch.Generator().manual_seed(0)), grid)
    transform = Composite([known_transform()])
    without = registration_figure(image, image, Affine.identity(), transform, content())
    with_spread = registration_figure(image, image, Affine.identity(), transform, content(), spread=image)
    titles = [axis.get_title() for axis in with_spread.axes]
    assert "uncertainty, mm" in titles
    assert "uncertainty, mm" not in [axis.get_title() for axis in without.axes]
    assert png(without, dpi=30).startswith(b"\x89PNG")
    shown = pixels(without, dpi=30)
    assert shown.dtype == np.uint8
    assert shown.std() > 10


def test_checkerboards_alternate():
    board = checkerboard(np.tile([0.0, 1.0], (32, 16)), np.tile([1.0, 0.0], (32, 16)), tile=16)
    assert (board[:16, :16] == board[16:, 16:]).all()
    assert (board[:16, :16] != board[:16, 16:]).all()
    assert (normalized(np.full((4, 4), 7.0)) == 0).all()


def test_columns_are_drawn_for_every_plane():
    drawn = []
    columns_figure([("a", lambda axis, plane: drawn.append(plane.name))], planes(content()))
    assert drawn == ["axial", "coronal", "sagittal"]
