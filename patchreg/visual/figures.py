"""Figures of a registration."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from patchreg.spatial import Affine, Foreground, Transform, Volume
from patchreg.visual.planes import Array, Plane, log_jacobian, mapped_mm, picture, planes, values_on

Draw = Callable[[Any, Plane], Any]

_LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))


def columns_figure(columns: Sequence[tuple[str, Draw]], shown: Sequence[Plane], size: float = 2.4) -> Figure:
    """Planes in rows and kinds of pictures in columns, with the world's directions on the edges."""
    heights = [p.extent_mm[3] - p.extent_mm[2] for p in shown]
    widest = max(p.extent_mm[1] - p.extent_mm[0] for p in shown)
    figure = Figure(figsize=(size * len(columns), size * sum(heights) / widest + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(shown), len(columns), squeeze=False, height_ratios=heights)
    for row, plane in enumerate(shown):
        for column, (title, draw) in enumerate(columns):
            axis = axes[row][column]
            artist = draw(axis, plane)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_aspect("equal")
            if row == 0:
                axis.set_title(title, fontsize=9)
            if column == 0:
                horizontal, vertical = (_LETTERS[a] for a in plane.axes)
                axis.set_ylabel(f"{plane.name}\n{vertical[0]} - {vertical[1]}", fontsize=7)
                axis.set_xlabel(f"{horizontal[0]} - {horizontal[1]}", fontsize=7)
            if artist is not None and row == len(shown) - 1:
                figure.colorbar(
                    artist, ax=axes[:, column].tolist(), location="bottom", shrink=0.8, pad=0.01
                ).ax.tick_params(labelsize=7)
    return figure


def registration_figure(
    fixed: Volume,
    moving: Volume,
    before: Transform,
    after: Transform,
    content: Foreground,
    spread: Volume | None = None,
    fixed_warp: Transform | None = None,
) -> Figure:
    """Fixed, moving before and after, checkerboards, the deformed grid, the log-Jacobian and the uncertainty.

    Args:
        fixed: the fixed image.
        moving: the moving image.
        before: where the registration started.
        after: what it found.
        content: what to look at in the fixed world.
        spread: the uncertainty in mm, if known.
        fixed_warp: the fixed image is seen through it.
    """
    still = fixed_warp or Affine.identity()
    columns: list[tuple[str, Draw]] = [
        ("fixed", lambda a, p: _gray(a, p, normalized(picture(fixed, still, p)))),
        ("moving, before", lambda a, p: _gray(a, p, normalized(picture(moving, before, p)))),
        ("moving, after", lambda a, p: _gray(a, p, normalized(picture(moving, after, p)))),
        (
            "checkerboard before",
            lambda a, p: _gray(a, p, checkerboard(picture(fixed, still, p), picture(moving, before, p))),
        ),
        (
            "checkerboard after",
            lambda a, p: _gray(a, p, checkerboard(picture(fixed, still, p), picture(moving, after, p))),
        ),
        ("deformed grid", lambda a, p: _grid(a, p, after)),
        ("log Jacobian", lambda a, p: _jacobian(a, p, after)),
    ]
    if spread is not None:
        columns.append(("uncertainty, mm", lambda a, p: _spread(a, p, spread)))
    return columns_figure(columns, planes(content))


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def pixels(figure: Figure, dpi: int = 110) -> Array:
    """The figure as (height, width, 3) uint8."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def normalized(image: Array) -> Array:
    """Intensities from 0 to 1, the brightest half percent saturated."""
    low, high = float(image.min()), float(np.percentile(image, 99.5))
    return np.clip((image - low) / (high - low), 0, 1) if high > low else np.zeros_like(image)


def checkerboard(first: Array, second: Array, tile: int = 16) -> Array:
    """Two pictures in alternating squares."""
    rows, columns = np.indices(first.shape) // tile
    return np.where((rows + columns) % 2 == 0, normalized(first), normalized(second))


def _gray(axis: Any, plane: Plane, image: Array) -> None:
    axis.imshow(image, cmap="gray", origin="lower", extent=plane.extent_mm, vmin=0, vmax=1, interpolation="nearest")


def _grid(axis: Any, plane: Plane, transform: Transform, step_mm: float = 8.0) -> None:
    left, right, bottom, top = plane.extent_mm
    for coordinate in mapped_mm(transform, plane):
        levels = np.arange(np.floor(coordinate.min() / step_mm), np.ceil(coordinate.max() / step_mm) + 1) * step_mm
        axis.contour(coordinate, levels=levels, extent=plane.extent_mm, colors="k", linewidths=0.5, linestyles="solid")
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)


def _jacobian(axis: Any, plane: Plane, transform: Transform) -> Any:
    values = log_jacobian(transform, plane)
    axis.set_facecolor("yellow")  # where the map folds
    return axis.imshow(values, cmap="RdBu_r", origin="lower", extent=plane.extent_mm, vmin=-1, vmax=1)


def _spread(axis: Any, plane: Plane, spread: Volume) -> Any:
    top = float(quantile(spread, 0.99))
    return axis.imshow(
        values_on(spread, plane), cmap="magma", origin="lower", extent=plane.extent_mm, vmin=0, vmax=max(top, 1e-3)
    )


def quantile(volume: Volume, q: float) -> float:
    """A quantile of a volume's values, of a copy of at most about a million voxels; all of it where it is shared out."""
    return float(np.quantile(volume.thumbnail(1_000_000).data.cpu().numpy(), q))
