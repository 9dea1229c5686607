"""Training: a chain of nested patches, each seen through the transform found so far."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from patchreg.cascade.prepared import Prepared
from patchreg.cascade.stage import Stage
from patchreg.errors import InputError
from patchreg.spatial import Affine, Composite, DisplacementField, Grid, MappedGrid, Transform


@dataclass(frozen=True, eq=False)
class PreparedPair:
    """Two images made ready, and where to start.

    Args:
        fixed: the image whose space the result lies in.
        moving: the image that is moved.
        initial: applied after everything the cascade finds; in training, the moving image's random deformation.
        fixed_warp: the fixed image is seen through it; in training, its random deformation.
    """

    fixed: Prepared
    moving: Prepared
    initial: Transform = field(default_factory=Affine.identity)
    fixed_warp: Transform = field(default_factory=Affine.identity)


@dataclass(eq=False)
class StageOutput:
    """What one stage did to the patches of a batch.

    Args:
        index: which stage, from 0.
        pairs: the pair that each of the N patches comes from.
        grids: their place.
        fixed: (N, C, I, J, K), normalised.
        update_mm: (N, 3, I, J, K), what a deformable stage answered; None for an affine one.
        fixed_points: the patch's points in the fixed image.
        mapped: the patch's points in the moving image, under the whole chain, this stage included.
        transforms: the chain after this stage, this stage's answer applied first.
    """

    index: int
    pairs: list[PreparedPair]
    grids: list[Grid]
    fixed: Tensor
    update_mm: Tensor | None
    fixed_points: list[MappedGrid]
    mapped: list[MappedGrid]
    transforms: list[Transform]

    @cached_property
    def moved(self) -> Tensor:
        """(N, C, I, J, K): the moving image, sampled once through the whole chain; made when it is first wanted."""
        return _patches(self.mapped, [pair.moving for pair in self.pairs])

    @cached_property
    def inside(self) -> Tensor:
        """(N, 1, I, J, K) bool: where the moving image was there to be sampled."""
        with torch.no_grad():
            volumes = [pair.moving.volume for pair in self.pairs]
            return torch.cat([m.inside(v.grid, v.device) for m, v in zip(self.mapped, volumes, strict=True)])


@dataclass(frozen=True, eq=False)
class _Link:
    """A patch of the chain so far: its pair, its place (None before the first stage) and its transform."""

    pair: PreparedPair
    grid: Grid | None
    transform: Transform


def run_chain(
    stages: Sequence[Stage], pairs: Sequence[PreparedPair], stop_gradients: bool, generator: torch.Generator | None
) -> Iterator[StageOutput]:
    """Draw a chain of nested patches for every pair and run the stages on it, one after the other as they are asked for.

    Memory depends on the number and size of the patches, never on the size of the images. Where gradients stop between
    stages, who takes an output's gradients and drops it before asking for the next holds the activations of one stage
    at a time.

    Args:
        stages: coarse to fine.
        pairs: of any sizes, spacings and orientations.
        stop_gradients: whether a stage's loss leaves the stages before it alone.
        generator: of the random patches.

    Yields:
        One output a stage and repeat; none for frozen stages.
    """
    shared = shared_grid([image for pair in pairs for image in (pair.fixed, pair.moving)])
    links = [_Link(pair, None, pair.initial) for pair in pairs]
    for index, stage in enumerate(stages):
        links = [
            _Link(link.pair, _place(stage, link, shared, generator), link.transform)
            for link in links
            for _ in range(stage.patches)
        ]
        for _ in range(stage.repeats):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not stage.frozen):
                output = _run(index, stage, links, shared)
            links = [
                _Link(link.pair, link.grid, t.detach() if stop_gradients else t)
                for link, t in zip(links, output.transforms, strict=True)
            ]
            if not stage.frozen:
                yield output
            del output  # or its activations would live on while the next stage runs


def shared_grid(images: Sequence[Prepared]) -> Grid:
    """The grid of an image that is shared out among processes, by which patches are, too; of the first where none is."""
    grids = [image.volume.grid for image in images]
    return next((grid for grid in grids if grid.is_part), grids[0])


def _place(stage: Stage, link: _Link, shared: Grid, generator: torch.Generator | None) -> Grid:
    """A patch for a link of the chain. Where images are shared out, so are the patches of deformable stages."""
    grid = link.pair.fixed.volume.grid
    parent = None if link.grid is None else link.grid.whole
    patch = stage.draw(link.pair.fixed.content, grid, parent, generator)
    return patch.whole if stage.predicts == "affine" else patch if patch.is_part else shared.share(patch)


def _run(index: int, stage: Stage, links: Sequence[_Link], shared: Grid) -> StageOutput:
    pairs, grids = [link.pair for link in links], [link.grid for link in links if link.grid is not None]
    fixed_points = [pair.fixed_warp.on(grid) for pair, grid in zip(pairs, grids, strict=True)]
    fixed = _patches(fixed_points, [pair.fixed for pair in pairs])
    before = [link.transform.on(grid) for link, grid in zip(links, grids, strict=True)]
    moving = _patches(before, [pair.moving for pair in pairs])
    if any(grid.is_part for grid in grids):
        _check_alike(grids, pairs)
        answer = stage.predict(fixed, moving, grids)
    else:  # every process sees all of the patches, and has a share of the gradients
        answer = shared.of_all(stage.predict(fixed, shared.for_part(moving), grids))
    transforms: list[Transform] = []
    for link, grid, a in zip(links, grids, answer, strict=True):
        step = Affine(a) if stage.predicts == "affine" else DisplacementField(grid, a[None])
        transforms.append(Composite([step, link.transform]))
    mapped = [t.on(grid) for t, grid in zip(transforms, grids, strict=True)]
    update = None if stage.predicts == "affine" else answer
    return StageOutput(index, pairs, grids, fixed, update, fixed_points, mapped, transforms)


def _check_alike(grids: Sequence[Grid], pairs: Sequence[PreparedPair]) -> None:
    """Raise unless the patches of a batch are cut the same way."""
    if len({(getattr(grid, "partition", None)) for grid in grids}) > 1:
        names = ", ".join(dict.fromkeys(pair.fixed.volume.name or str(pair.fixed.volume.grid) for pair in pairs))
        raise InputError(
            f"{names}: images of one batch are stored so differently that they cannot be cut the same way; set batch_size: 1"
        )


def _patches(points: Sequence[MappedGrid], images: Sequence[Prepared]) -> Tensor:
    """The images at the points, (N, C, I, J, K), at the resolution of the patches."""
    return torch.cat([p.sample(image.at(min(p.grid.spacing))) for p, image in zip(points, images, strict=True)])
