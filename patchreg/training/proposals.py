"""Settings with which an experiment's training step fits a device, the least change first."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from patchreg.cascade.storage import build_cascade
from patchreg.errors import InputError
from patchreg.training.estimate import Peak, Setting, training_peak
from patchreg.training.module import RegistrationModule
from patchreg.types import Progress

Changes = dict[str, Any]
"""Settings by their place: ``precision``, ``batch_size``, or below ``stages``, such as ``0.init_args.patch_shape``."""

SMALLEST_PATCH = 16
TRIES = 24
COSTS = (1, 2, 3, 4)
"""Of one step along each way: another policy of memory gives the same gradients; half precision coarser ones; fewer pairs
or patches noisier ones; a smaller patch sees less."""


@dataclass(frozen=True)
class Proposal:
    """A setting that fits.

    Args:
        changes: to the experiment.
        peak: of a training step.
    """

    changes: Changes
    peak: Peak


def propose(
    module: RegistrationModule,
    cascade: dict[str, Any],
    setting: Setting,
    fits: Callable[[Peak], bool],
    wanted: int = 3,
    progress: Progress | None = None,
) -> list[Proposal]:
    """Look for settings whose training step fits.

    Four ways are gone, and combined: what networks keep for the backward pass, the precision on a GPU, pairs and patches
    of a step, the size of patches. A setting is passed over where a smaller change along the same ways fits already, or where it makes no network.

    Args:
        module: whose objective and optimiser are taken.
        cascade: ``class_path`` and ``init_args`` that build its cascade, with all defaults.
        setting: the step's.
        fits: whether a device takes a peak.
        wanted: how many to find.
        progress: told after every try.

    Returns:
        The least change first; none where nothing in reach fits.
    """
    stages = cascade["init_args"]["stages"]
    ways = [
        list(_policies(stages, setting.gpu)),
        [{}, {"precision": "bf16-mixed"}] if setting.gpu and setting.precision is None else [{}],
        list(_batches(stages, setting.batch_size)),
        list(_patches(stages)),
    ]
    search = _Search(ways, lambda changes: _peak_with(changes, module, cascade, setting), fits, progress)
    return search.run(wanted)


class _Search:
    """Over all combinations of levels of the ways; peaks are taken to fall along every way."""

    def __init__(
        self,
        ways: list[list[Changes]],
        peak: Callable[[Changes], Peak | None],
        fits: Callable[[Peak], bool],
        progress: Progress | None,
    ) -> None:
        self.ways, self._peak, self._fits, self._progress = ways, peak, fits, progress
        self._known: dict[tuple[int, ...], Peak | None] = {}

    def run(self, wanted: int) -> list[Proposal]:
        """Proposals, the least change first, none of them more than another along every way."""
        last = [len(way) - 1 for way in self.ways]
        while self._peak_at(last) is None and last[-1]:
            last[-1] -= 1  # no network takes so small a patch
        if self.at(last) is None:
            return []
        needed = [
            next(n for n in range(end + 1) if self.at([*last[:w], n, *last[w + 1 :]])) for w, end in enumerate(last)
        ]
        steps = itertools.product(*(range(n, end + 1) for n, end in zip(needed, last, strict=True)))
        found: dict[tuple[int, ...], Proposal] = {}
        for taken in sorted(steps, key=lambda taken: sum(c * n for c, n in zip(COSTS, taken, strict=True))):
            if len(found) == wanted or len(self._known) >= TRIES:
                break
            if any(all(n >= m for n, m in zip(taken, less, strict=True)) for less in found):
                continue
            proposal = self.at(taken)
            if proposal is not None:
                found[taken] = proposal
        return list(found.values())

    def at(self, levels: Sequence[int]) -> Proposal | None:
        """The proposal of these levels, where they make a network and fit."""
        peak = self._peak_at(levels)
        return None if peak is None or not self._fits(peak) else Proposal(self._changes(levels), peak)

    def _changes(self, levels: Sequence[int]) -> Changes:
        return {key: value for way, n in zip(self.ways, levels, strict=True) for key, value in way[n].items()}

    def _peak_at(self, levels: Sequence[int]) -> Peak | None:
        taken = tuple(levels)
        if taken not in self._known:
            self._known[taken] = self._peak(self._changes(taken))
            if self._progress:
                self._progress("trying other settings", min(len(self._known), TRIES), TRIES)
        return self._known[taken]


def _peak_with(changes: Changes, module: RegistrationModule, cascade: dict[str, Any], setting: Setting) -> Peak | None:
    changed = copy.deepcopy(cascade)
    for place, value in changes.items():
        if place == "batch_size":
            setting = replace(setting, batch_size=value)
            continue
        if place == "precision":
            setting = replace(setting, precision=torch.bfloat16)
            continue
        index, *path, name = place.split(".")
        target = changed["init_args"]["stages"][int(index)]
        for key in path:
            target = target[key]
        target[name] = value
    try:
        built = build_cascade({"cascade": changed})
        return training_peak(RegistrationModule(built, module.objective, module.optimization), setting)
    except InputError:
        return None


def _policies(stages: list[dict[str, Any]], gpu: bool) -> Iterator[Changes]:
    """What the networks that are trained keep: as it is, then less and less."""
    yield {}
    networks = {
        place: options
        for index, stage in enumerate(stages)
        if not stage["init_args"].get("frozen")
        for place, options in _networks(f"{index}.init_args.network", stage["init_args"]["network"])
    }
    least: Changes = {}
    for policy in ("checkpoint", "reversible"):
        for place, options in networks.items():
            possible = policy == "checkpoint" or options.get("reversible") or "before" in options  # as Elongated has
            if "memory" in options and possible and options["memory"] not in (policy, "reversible"):
                least = {**least, f"{place}.memory": policy}
        if policy in least.values():
            yield least
    offloaded = {f"{p}.offload": True for p, options in networks.items() if options.get("offload") is False}
    if gpu and offloaded:
        yield {**least, **offloaded}


def _networks(place: str, network: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The options of a network, and of the network that it is made of, by their place."""
    options = network.get("init_args", {})
    yield f"{place}.init_args", options
    if isinstance(options.get("network"), dict):
        yield from _networks(f"{place}.init_args.network", options["network"])


def _batches(stages: list[dict[str, Any]], batch_size: int) -> Iterator[Changes]:
    """Pairs of a step, halved until there is one; then the patches of the stage that draws most, halved likewise."""
    yield {}
    while batch_size > 1:
        batch_size //= 2
        yield {"batch_size": batch_size}
    changes: Changes = {"batch_size": 1}
    patches = [stage["init_args"].get("patches", 1) for stage in stages]
    while max(patches) > 1:
        index = patches.index(max(patches))
        patches[index] //= 2
        changes = {**changes, f"{index}.init_args.patches": patches[index]}
        yield changes


def _patches(stages: list[dict[str, Any]]) -> Iterator[Changes]:
    """Patches of the deformable stages: as they are, then the largest smaller and smaller, in multiples of 16."""
    yield {}
    shapes = {
        f"{index}.init_args.patch_shape": _three(stage["init_args"]["patch_shape"])
        for index, stage in enumerate(stages)
        if stage["init_args"].get("predicts") != "affine" and stage["init_args"].get("spacing") != "image"
    }
    changes: Changes = {}
    while shapes and max(map(max, shapes.values())) > SMALLEST_PATCH:
        largest = max(map(max, shapes.values()))
        for place, shape in shapes.items():
            if max(shape) == largest:
                shapes[place] = [_smaller(n) for n in shape]
                changes = {**changes, place: shapes[place][0] if len(set(shapes[place])) == 1 else shapes[place]}
        yield changes


def _smaller(size: int) -> int:
    return min(size, max(SMALLEST_PATCH, size * 3 // 4 // 16 * 16))


def _three(shape: int | list[int]) -> list[int]:
    return [shape] * 3 if isinstance(shape, int) else list(shape)
