"""A pair of images in, a transform out."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

import patchreg
from patchreg.cascade import PatchCascade, Prepared, Stage, shared_grid
from patchreg.distributed.communication import Group, check_sends_from
from patchreg.distributed.convert import convert_sharded
from patchreg.errors import InputError
from patchreg.inference.initial import starting_points
from patchreg.inference.inputs import read_images, read_initial
from patchreg.inference.pretrained import DEFAULT_MODEL, load_model, model_identity
from patchreg.inference.ranks import Ranks
from patchreg.inference.refine import Refinement, contrast_agreement, refine_affine, refine_deformable, similarity
from patchreg.inference.registration import Registration, folding_of
from patchreg.io import Image
from patchreg.memory import peak_mib
from patchreg.spatial import Affine, Composite, DisplacementField, Grid, Transform, Volume, collapse
from patchreg.types import Progress

log = logging.getLogger(__name__)

Kind = Literal["rigid", "affine", "deformable"]

SAME_CONTRAST = 0.85
"""Of :func:`contrast_agreement`, from where on images are refined on the pair without being asked. Pairs of T1-weighted
scans, and pairs of heads made with one contrast, had 0.95 to 1.00; pairs of unrelated contrasts -0.66 to 0.68."""

DEVICE_SHARE = 0.5
"""Of a GPU's free memory, what images and fields may take; the rest is for the networks."""


def register(
    fixed: Any,
    moving: Any,
    model: str | Path | PatchCascade = DEFAULT_MODEL,
    transform: Kind = "deformable",
    refine: bool | None = None,
    fixed_mask: Any = None,
    moving_mask: Any = None,
    moving_labels: Any = None,
    initial_transform: str | Path | Transform | None = None,
    device: str = "auto",
    seed: int = 0,
    passes: int | None = None,
    refinement: Refinement | None = None,
    progress: Progress | None = None,
    group: Group = None,
) -> Registration:
    """Register two images.

    With a ``group`` its processes register one pair together, which none of them needs to have room for: each reads its
    slab of every file (:func:`patchreg.io.open_slabs` says of which formats), and keeps its slab of every image, field and
    step of the optimisation. All must call this with the same arguments, and then the same methods of what it returns.

    Args:
        fixed: the image whose space the result lies in: a path, a nibabel image or a torchio image, of any size,
            spacing and orientation.
        moving: the image that is moved.
        model: a model of the zoo by name, a folder, or a cascade.
        transform: ``"rigid"``, ``"affine"`` or ``"deformable"``.
        refine: optimise the result on this pair. None: if bright is bright in both (see
            :func:`patchreg.inference.refine.contrast_agreement`), because local correlation misleads where it is not;
            or if ``refinement`` asks for mutual information.
        fixed_mask: where the fixed image counts; voxels that are not zero.
        moving_mask: the same for the moving image. Masks say where content lies and where similarity is measured.
        moving_labels: a label map of the moving image, to be moved along.
        initial_transform: where to start, fixed world to moving world. None: the headers, or centres of mass, whichever
            leads to a better affine map.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        seed: of the random patches of further passes.
        passes: times each deformable stage covers the image with other patches; more give a finer uncertainty.
        refinement: settings of the optimisation.
        progress: called with the step's name, parts done and parts in all.
        group: the processes that share the images: a process group that sends from the host, too, or a mesh of one axis.
            None: this process has all.

    Returns:
        The transform, and what can be made with it.

    Raises:
        InputError: an image, mask, model or setting that cannot be used; the message says which and what to do.
        UnsupportedSharding: a network that cannot run on slabs.
    """
    if transform not in ("rigid", "affine", "deformable"):
        raise InputError(f"transform must be 'rigid', 'affine' or 'deformable', got {transform!r}")
    settings = refinement or Refinement()
    clock, ranks = _Clock(), Ranks(group)
    target = find_device(device)
    if ranks.group is not None:
        check_sends_from(target, ranks.group)
    if target.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(target)
    with clock("read"):
        images = read_images(fixed, moving, fixed_mask, moving_mask, moving_labels, ranks)
        start = read_initial(initial_transform, ranks)
    with clock("load model"), ranks.together():
        cascade = (model if isinstance(model, PatchCascade) else load_model(model)).to(target)
        if ranks.group is not None:
            for stage in cascade.stages:
                if isinstance(stage, Stage) and stage.predicts != "affine":
                    convert_sharded(stage.network)
        identity = {"name": "given as a module"} if isinstance(model, PatchCascade) else model_identity(model)
    with clock("prepare"):
        stores = ranks.all_of(storage_device(target, images.fixed.volume.grid, images.moving.volume.grid).type)
        store = torch.device("cpu") if "cpu" in stores else target
        fixed_ready = cascade.prepare(images.fixed.volume.to(store), mask=_volume(images.fixed_mask, store))
        moving_ready = cascade.prepare(images.moving.volume.to(store), mask=_volume(images.moving_mask, store))
    with clock("affine"):
        starts = [("given", start)] if start is not None else starting_points(fixed_ready, moving_ready)
        best = _affine(cascade, fixed_ready, moving_ready, starts, transform, refine, settings, target, seed, progress)
    name, began, affine = best.name, dict(starts)[best.name], best.chain
    if refine is None and not best.refined and ranks.first:
        log.warning(
            "%s and %s differ in contrast (agreement %.2f): what the networks found is not refined on the pair; "
            "--refine does so all the same",
            images.fixed.path,
            images.moving.path,
            best.agreement,
        )
    found: Transform = affine
    uncertainty: Volume | None = None
    if transform == "deformable":
        with clock("cascade"):
            result = cascade.register(
                fixed_ready, moving_ready, affine, "deformable", passes=passes, seed=seed, progress=progress
            )
            found, uncertainty = result.transform, result.spread
        if best.refined:
            with clock("refine"):
                found = refine_deformable(fixed_ready, moving_ready, found, settings, target, progress)
    with clock("collapse"):
        total = collapse(found, images.fixed.volume.grid)
    fields = [t for t in total.transforms if isinstance(t, DisplacementField)]
    folding, jacobian_std = folding_of(total, fields[0].grid) if fields else (0.0, 0.0)
    peaks = ranks.all_of(peak_mib(target))
    summary: dict[str, Any] = {
        "patchreg": patchreg.__version__,
        "fixed": images.fixed.path,
        "moving": images.moving.path,
        "transform": transform,
        "model": identity,
        "refined": best.refined,
        "contrast_agreement": round(best.agreement, 4),
        "seed": seed,
        "start": name,
        "similarity": {
            "measure": "lncc at 2 mm" if settings.similarity == "lncc" else "mutual information at 2 mm",
            "before": round(similarity(fixed_ready, moving_ready, began, settings, 2.0), 5),
            "affine": round(similarity(fixed_ready, moving_ready, affine, settings, 2.0), 5),
            "after": round(similarity(fixed_ready, moving_ready, total, settings, 2.0), 5),
        },
        "folding_percent": round(folding, 5),
        "log_jacobian_std": round(jacobian_std, 5),
        "seconds": clock.seconds,
        "peak_memory_mib": {kind: max(peak[kind] for peak in peaks) for kind in peaks[0]},
        "device": str(target),
        "devices": ranks.count,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": version("lightning"),
        },
    }
    if ranks.count > 1:
        summary["peak_memory_mib_by_rank"] = peaks
    return Registration(
        total,
        total.affine_part(),
        began,
        images.fixed,
        images.moving,
        images.moving_labels,
        fixed_ready.content,
        uncertainty,
        summary,
        ranks,
    )


def find_device(name: str) -> torch.device:
    """The device of a name.

    Raises:
        InputError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device {name!r} is unknown: give auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device 'cuda' was asked for, but torch sees no GPU: use --device cpu, or install a CUDA build of torch"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {name!r} was asked for, but the last one is cuda:{torch.cuda.device_count() - 1}")
    return device


def storage_device(device: torch.device, *grids: Grid) -> torch.device:
    """Where images and fields stay while stages run: on a GPU if they fit, otherwise on the host.

    Counts a normalised copy of each image besides itself, and ten more volumes of the first for fields.
    """
    if device.type != "cuda":
        return device
    needed = 4 * (sum(2 * g.voxels for g in grids) + 10 * grids[0].voxels)
    free, _ = torch.cuda.mem_get_info(device)
    return device if needed < DEVICE_SHARE * free else torch.device("cpu")


def _volume(image: Image | None, device: torch.device) -> Volume | None:
    return None if image is None else image.volume.to(device)


@dataclass(frozen=True)
class _Start:
    """What was found from a starting point: the rigid or affine chain, how good it is, and whether to refine."""

    name: str
    chain: Transform
    similarity: float
    agreement: float
    refined: bool


def _affine(
    cascade: PatchCascade,
    fixed: Prepared,
    moving: Prepared,
    starts: list[tuple[str, Transform]],
    kind: Kind,
    refine: bool | None,
    settings: Refinement,
    device: torch.device,
    seed: int,
    progress: Progress | None,
) -> _Start:
    """The best of what is found from every starting point; of equals the first."""
    tried: list[_Start] = []
    for name, start in starts:
        found = cascade.register(fixed, moving, start, "affine", seed=seed, progress=progress).affine
        found = _alike(found, shared_grid([fixed, moving]))
        if kind == "rigid":
            found = _rigid(found, start, fixed)
        agreement = contrast_agreement(fixed, moving, found, settings.affine_spacing_mm)
        chosen = refine if refine is not None else settings.similarity == "mi" or agreement >= SAME_CONTRAST
        if chosen:
            step = refine_affine(fixed, moving, found, settings, kind == "rigid", device, progress)
            found = Composite([step, found])
        likeness = similarity(fixed, moving, found, settings, settings.affine_spacing_mm)
        tried.append(_Start(name, found, likeness, agreement, chosen))
    return max(tried, key=lambda item: item.similarity)


def _alike(chain: Transform, grid: Grid) -> Composite:
    """The chain with the same affine maps in every process that shares a grid, as each ran the networks itself."""
    parts = Composite([chain]).transforms
    return Composite([Affine(grid.alike(part.matrix)) if isinstance(part, Affine) else part for part in parts])


def _rigid(found: Transform, start: Transform, fixed: Prepared) -> Transform:
    """What the affine stages added, made rigid, before the start."""
    before = Composite([start]).affine_part()
    added = Affine(before.inverse().matrix @ Composite([found]).affine_part().matrix)
    return Composite([added.rigid_at(fixed.content.center_mm), start])


@dataclass
class _Clock:
    """Seconds by step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = round(time.perf_counter() - start, 3)
        log.debug("%s: %.2f s", step, self.seconds[step])
