"""The commands that are not Lightning's: their options, and what they print."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchreg.cli.progress import progress_bars

if TYPE_CHECKING:
    import torch.distributed as dist

    from patchreg.inference import Registration

Subparsers = Any


def add_register(parsers: Subparsers) -> None:
    """``patchreg register``."""
    p = parsers.add_parser(
        "register",
        help="register two images",
        description="Find the transform from a fixed to a moving image, and write it with the moved image, the displacement, "
        "its inverse, a summary and a report. Images may be NIfTI, MGH, NRRD, MetaImage or OME-Zarr, of any size, spacing and orientation; "
        "no preprocessing is needed.",
    )
    p.add_argument("--fixed", type=Path, required=True, metavar="F", help="image whose space the result lies in")
    p.add_argument("--moving", type=Path, required=True, metavar="M", help="image that is moved")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results")
    p.add_argument(
        "--model",
        default=None,
        metavar="NAME|FOLDER",
        help="model of the zoo (see 'patchreg models'), or a run's folder 'model'",
    )
    p.add_argument(
        "--transform", choices=("rigid", "affine", "deformable"), default="deformable", help="default: %(default)s"
    )
    p.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="optimise the result on this pair (default: if both have the same contrast)",
    )
    p.add_argument(
        "--similarity",
        choices=("lncc", "mi"),
        default="lncc",
        help="what the optimisation maximises; mi optimises whatever the contrasts (default: %(default)s)",
    )
    p.add_argument("--fixed-mask", type=Path, metavar="F", help="where the fixed image counts")
    p.add_argument("--moving-mask", type=Path, metavar="M", help="where the moving image counts")
    p.add_argument("--moving-labels", type=Path, metavar="L", help="label map of the moving image, moved along")
    p.add_argument("--initial-transform", type=Path, metavar="T", help="ITK transform to start from")
    p.add_argument(
        "--passes",
        type=int,
        default=None,
        metavar="N",
        help="cover the image N times with other patches: a finer uncertainty map",
    )
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the random patches (default: %(default)s)")
    _device(p)
    p.add_argument(
        "--devices",
        type=int,
        default=None,
        metavar="N",
        help="processes that share the images, each with a GPU of its own where there are some: for volumes that do not fit "
        "one. Reads .nii and OME-Zarr by parts; writes .nii (.ome.zarr where the fixed image is) and affine.h5, no "
        "transform.h5: 'patchreg apply' takes displacement.nii. Leave it out under torchrun and srun, which start the "
        "processes (default: 1)",
    )
    _common(p)
    p.set_defaults(command=_register, staged=None)


def _register(options: argparse.Namespace) -> None:
    from patchreg.cli.processes import check_devices, find_place, run_at, start
    from patchreg.io import staged_folder

    place = find_place()
    count = check_devices(options.devices, options.device, place)
    if count == 1:
        with staged_folder(options.output) as out:  # the output is known to be writable before the work begins
            _registered(options, None).write(out)
    elif place is None:
        with staged_folder(options.output) as out:
            start(count, _register_shared, argparse.Namespace(**{**vars(options), "staged": out}))
    else:
        run_at(place, _register_shared, options)
    if place is None or place.rank == 0:
        _tell(options)


def _register_shared(group: dist.ProcessGroup, options: argparse.Namespace) -> None:
    """What each of several processes does."""
    from patchreg.inference.ranks import Ranks

    if options.staged is not None:
        _registered(options, group).write(options.staged)
        return
    with Ranks(group).folder(options.output) as out:
        _registered(options, group).write(out)


def _registered(options: argparse.Namespace, group: dist.ProcessGroup | None) -> Registration:
    from patchreg.inference.pipeline import register
    from patchreg.inference.pretrained import DEFAULT_MODEL
    from patchreg.inference.ranks import Ranks
    from patchreg.inference.refine import Refinement

    with progress_bars(not options.quiet and Ranks(group).first) as progress:
        return register(
            options.fixed,
            options.moving,
            model=options.model or DEFAULT_MODEL,
            transform=options.transform,
            refine=options.refine,
            fixed_mask=options.fixed_mask,
            moving_mask=options.moving_mask,
            moving_labels=options.moving_labels,
            initial_transform=options.initial_transform,
            device=options.device,
            seed=options.seed,
            passes=options.passes,
            refinement=Refinement(similarity=options.similarity),
            progress=progress,
            group=group,
        )


def _tell(options: argparse.Namespace) -> None:
    """Print what was found."""
    if options.quiet:
        return
    found = json.loads((options.output / "summary.json").read_text())
    s = found["similarity"]
    print(f"{s['measure']}: {s['before']:.3f} before, {s['affine']:.3f} affine, {s['after']:.3f} after; "
          f"{found['folding_percent']:.3f} % folded; {sum(found['seconds'].values()):.1f} s")  # fmt: skip
    print(f"results in {options.output}; look at {options.output / 'report.html'}")


def add_apply(parsers: Subparsers) -> None:
    """``patchreg apply``."""
    p = parsers.add_parser(
        "apply",
        help="take another image through a transform",
        description="Resample an image onto a reference grid, of any resolution, through an ITK transform or displacement field.",
    )
    p.add_argument(
        "transform", type=Path, metavar="TRANSFORM", help="transform.h5, an ANTs .mat, or a displacement field"
    )
    p.add_argument("image", type=Path, metavar="IMAGE")
    p.add_argument("--reference", type=Path, required=True, metavar="FIXED", help="image whose grid the result has")
    p.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="ends in .nii or .nii.gz")
    p.add_argument(
        "--interpolation",
        choices=("linear", "nearest", "label"),
        default="linear",
        help="label keeps label maps whole (default: %(default)s)",
    )
    p.add_argument("--inverse", action="store_true", help="apply the inverse of the transform")
    _common(p)
    p.set_defaults(command=_apply)


def _apply(options: argparse.Namespace) -> None:
    from patchreg.inference.apply import apply_to_file

    apply_to_file(
        options.transform, options.image, options.reference, options.output, options.interpolation, options.inverse
    )


def add_evaluate(parsers: Subparsers) -> None:
    """``patchreg evaluate``."""
    p = parsers.add_parser(
        "evaluate",
        help="overlap of labels, and folding",
        description="Dice of two label maps on one grid, and how regular a displacement is.",
    )
    p.add_argument("--fixed-labels", type=Path, required=True, metavar="F")
    p.add_argument("--moved-labels", type=Path, required=True, metavar="M")
    p.add_argument("--displacement", type=Path, metavar="D", help="ITK displacement field or transform")
    p.add_argument("--json", action="store_true", help="print JSON")
    _common(p)
    p.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from patchreg.inference.evaluate import evaluate_files

    found = evaluate_files(options.fixed_labels, options.moved_labels, options.displacement)
    if options.json:
        print(json.dumps(_without_nan(found), indent=2))
        return
    table = Table("label", "Dice")
    for label, value in found["dice"].items():
        table.add_row(label, f"{value:.3f}")
    table.add_section()
    table.add_row(f"mean of {found['labels']}", f"{found['dice_mean']:.3f}")
    for key in ("folding_percent", "log_jacobian_std", "displacement_mean_mm"):
        if key in found:
            table.add_row(key.replace("_", " "), f"{found[key]:.3f}")
    Console().print(table)


def add_models(parsers: Subparsers) -> None:
    """``patchreg models``."""
    p = parsers.add_parser(
        "models", help="the pretrained models", description="List the zoo, or print the card of one model."
    )
    p.add_argument("name", nargs="?", metavar="NAME", help="print this model's card")
    _common(p)
    p.set_defaults(command=_models)


def _models(options: argparse.Namespace) -> None:
    from patchreg.errors import ModelNotFound
    from patchreg.inference.pretrained import DEFAULT_MODEL, model_cards

    cards = model_cards()
    if options.name is None:
        for card in cards:
            default = "  (default)" if card.name == DEFAULT_MODEL else ""
            print(f"{card.name:20s} {card.megabytes:5.1f} MB  {card.title}{default}")
        return
    for card in cards:
        if card.name == options.name:
            print(card.text.strip())
            print(f"\nFolder: {card.folder}")
            return
    raise ModelNotFound(
        f"no model {options.name!r} in the zoo: it has {', '.join(card.name for card in cards) or 'none'}"
    )


def add_kernels(parsers: Subparsers) -> None:
    """``patchreg kernels``."""
    p = parsers.add_parser(
        "kernels",
        help="which kernels are active here, and a self-test",
        description="Say for each device of this machine whether the operations run on native kernels or on plain PyTorch, "
        "and why. Kernels for NVIDIA GPUs are compiled on first use; no CUDA toolkit is needed.",
    )
    p.add_argument(
        "--check",
        action="store_true",
        help="run every operation on every device and compare values and gradients with float64; exit status 2 if any is wrong",
    )
    _common(p)
    p.set_defaults(command=_kernels)


def _kernels(options: argparse.Namespace) -> None:
    from patchreg import ops
    from patchreg.errors import BackendUnavailable
    from patchreg.inference.kernels import check_kernels, list_targets
    from patchreg.ops.cuda.compile import cache_folder

    targets = list_targets()
    for target in targets:
        print(f"{target.device!s:8s} {target.backend:20s} {target.name}")
        if target.reason is not None:
            print(f"{'':8s} {target.reason}")
        elif target.device.type == "cuda":
            print(f"{'':8s} compiled on first use, kept in {cache_folder()}")
    print(f"operations: {', '.join(sorted(ops.__all__))}")
    if not options.check:
        return
    wrong = []
    for check in check_kernels(targets):
        print(
            f"{check.target.device!s:8s} {check.operation:18s} {check.variant:10s} "
            f"relative error {check.value_error:.1e}, of the gradient {check.gradient_error:.1e}"
            f"{'' if check.passed else '  WRONG'}"
        )
        if not check.passed:
            wrong.append(f"{check.operation} ({check.variant}) on {check.target.device}")
    if wrong:
        raise BackendUnavailable(
            f"{len(wrong)} kernels are wrong here: {', '.join(wrong)}; use backend='reference' and report it"
        )
    print("all right")


def add_demo(parsers: Subparsers) -> None:
    """``patchreg demo``."""
    p = parsers.add_parser(
        "demo",
        help="everything on a made pair",
        description="Make two heads of different shape, position, orientation and voxel size, register them, and measure. "
        "No download, no GPU, a minute or two.",
    )
    p.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the results")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="which heads (default: %(default)s)")
    p.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="optimise the result on the pair (default: yes, as both have the same contrast)",
    )
    _common(p)
    p.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> None:
    from patchreg.inference.demo import run_demo

    with progress_bars(not options.quiet) as progress:
        found = run_demo(options.output, options.seed, refine=options.refine, progress=progress)
    seconds = sum(found.summary["seconds"].values())
    print(f"Dice of the brain's labels: {found.dice_before:.3f} before, {found.dice_affine:.3f} affine, {found.dice_after:.3f} after; "
          f"{found.summary['folding_percent']:.3f} % folded; registered in {seconds:.1f} s")  # fmt: skip
    print(f"results in {found.folder}; look at {found.folder / 'report.html'}")


def _device(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--device", default="auto", metavar="auto|cpu|cuda", help="where the networks run (default: %(default)s)"
    )


def _common(p: argparse.ArgumentParser) -> None:
    p.add_argument("-v", "--verbose", action="store_true", help="say more, and where an error came from")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bars")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
