"""Inference: every stage covers the image with overlapping patches and blends their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchreg.cascade.chain import PreparedPair, shared_grid
from patchreg.cascade.stage import Stage
from patchreg.spatial import Affine, Composite, DisplacementField, Grid, Transform, Volume
from patchreg.spatial.patches import Blend, tile, window
from patchreg.types import Progress, Shape3


@dataclass(eq=False)
class Result:
    """What a cascade found.

    Args:
        transform: fixed world to moving world; the last stage is applied first, the initial transform last.
        affine: the part of it that the affine stages found, with the initial transform.
        spread: how far the patches of the last deformable stage disagree, a standard deviation in mm, on the stage's
            lattice. None where no stage has overlapping patches.
    """

    transform: Composite
    affine: Transform
    spread: Volume | None = None


@torch.no_grad()
def cover_all(
    stages: Sequence[Stage],
    pair: PreparedPair,
    batch: int,
    device: torch.device,
    generator: torch.Generator,
    passes: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Run all stages over the content of the fixed image.

    Memory on the networks' device: ``batch`` patches through a network. Where the fixed image is: five volumes of a
    stage's lattice while it runs, and three for its answer afterwards.

    Args:
        stages: coarse to fine.
        pair: the images.
        batch: patches that go through a network together.
        device: where the networks run.
        generator: of random passes.
        passes: overrides the stages' own.
        progress: told after every batch of patches.
    """
    chain: Transform = pair.initial
    affine: Transform = pair.initial
    spread: Volume | None = None
    for number, stage in enumerate(stages, start=1):
        name = f"stage {number} of {len(stages)}: {stage.predicts}"
        lattice = stage.lattice(pair.fixed.content, pair.fixed.volume.grid)
        if stage.predicts == "affine":
            lattice = lattice.whole
        elif not lattice.is_part:
            lattice = shared_grid([pair.fixed, pair.moving]).share(lattice)
        for _ in range(stage.repeats):
            if stage.predicts == "affine":
                chain = Composite([_affine(stage, pair, chain, lattice, device), chain])
                affine = chain
                if progress:
                    progress(name, 1, 1)
                continue
            blend, overlapping = _cover(stage, pair, chain, lattice, batch, device, generator, passes, name, progress)
            chain = Composite([DisplacementField(lattice, blend.mean_mm()), chain])
            if overlapping:
                spread = Volume(blend.spread_mm()[0].cpu(), lattice, "uncertainty")
    return Result(Composite([chain]), affine, spread)


def _affine(stage: Stage, pair: PreparedPair, chain: Transform, grid: Grid, device: torch.device) -> Affine:
    fixed, moving = _patches(pair, chain, [grid], device)
    return Affine(stage.predict(fixed, moving, [grid])[0])


def _cover(
    stage: Stage,
    pair: PreparedPair,
    chain: Transform,
    lattice: Grid,
    batch: int,
    device: torch.device,
    generator: torch.Generator,
    passes: int | None,
    name: str,
    progress: Progress | None,
) -> tuple[Blend, bool]:
    whole = lattice.whole
    patch: Shape3 = whole.shape if stage.spacing == "image" else stage.patch_shape
    starts = list(_starts(stage, whole, patch, generator, passes or stage.passes))
    weight = window(patch)
    blend = Blend.empty(lattice, pair.fixed.volume.device)
    for done in range(0, len(starts), batch):
        some = starts[done : done + batch]
        share = shared_grid([pair.fixed, pair.moving]).share
        grids = [lattice if patch == whole.shape else share(whole.crop(start, patch)) for start in some]
        fixed, moving = _patches(pair, chain, grids, device)
        answer = stage.predict(fixed, moving, grids)
        for start, displacement, grid in zip(some, answer, grids, strict=True):
            if grid is lattice:
                blend.add((0, 0, 0), displacement[None], window(lattice.shape) if lattice.is_part else weight)
            else:
                blend.add(lattice.local(start), grid.gathered(displacement)[None], weight)
        if progress:
            progress(name, min(done + batch, len(starts)), len(starts))
    return blend, len(starts) > 1


def _starts(stage: Stage, lattice: Grid, patch: Shape3, generator: torch.Generator, passes: int) -> Iterator[Shape3]:
    yield from tile(lattice.shape, patch, stage.overlap)
    if lattice.shape != patch:
        for _ in range(passes - 1):
            yield from tile(lattice.shape, patch, stage.overlap, generator)


def _patches(
    pair: PreparedPair, chain: Transform, grids: Sequence[Grid], device: torch.device
) -> tuple[Tensor, Tensor]:
    spacing = min(grids[0].spacing)
    fixed, moving = pair.fixed.at(spacing), pair.moving.at(spacing)
    fixed_patches = [pair.fixed_warp.on(grid).sample(fixed).to(device) for grid in grids]
    moving_patches = [chain.on(grid).sample(moving).to(device) for grid in grids]
    return torch.cat(fixed_patches), torch.cat(moving_patches)
