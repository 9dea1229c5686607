"""``patchreg memory``: what a training step will take, before it runs."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchreg.cli.memory_report import GIB, STAGES, print_report
from patchreg.cli.progress import progress_bars

if TYPE_CHECKING:
    from patchreg.cli.experiment import Experiment
    from patchreg.training.estimate import Peak, Setting
    from patchreg.training.proposals import Changes, Proposal

DEFAULT_SHAPE, DEFAULT_SPACING = (160, 192, 224), (1.0, 1.0, 1.0)

DESCRIPTION = """\
Estimate the peak memory of a training step, and of registering a pair, for a configuration as 'patchreg fit' takes it.
No GPU is needed and nothing is computed: the real code runs on tensors that have shapes and no numbers, in seconds. With
--device-gb (or on a machine with a GPU) it is said whether the step fits, and if not, which settings would.
"""

EPILOG = """\
Any other option is passed on as 'patchreg fit' takes it, such as --data.batch_size 2 or --trainer.precision bf16-mixed.
Where trainer.accelerator is 'cpu' the account is of a CPU, otherwise of a GPU. docs/memory.md says how to read the table.
"""


def add_memory(parsers: Any) -> None:
    """``patchreg memory``."""
    p = parsers.add_parser(
        "memory", help="the peak memory of training, before it runs", description=DESCRIPTION, epilog=EPILOG
    )
    p.add_argument(
        "-c", "--config", type=Path, action="append", required=True, metavar="C",
        help="experiment; given again, later files override earlier ones",
    )  # fmt: skip
    p.add_argument(
        "--device-gb",
        type=float,
        metavar="GB",
        help="memory of the device, in GiB (default: that of this machine's GPU)",
    )
    p.add_argument(
        "--image-shape", type=int, nargs=3, metavar=("I", "J", "K"),
        help="voxels of an image (default: those of the configured data where they are there, else 160 192 224)",
    )  # fmt: skip
    p.add_argument(
        "--image-spacing",
        type=float,
        nargs="+",
        metavar="MM",
        help="one or three voxel sizes (default: likewise, else 1)",
    )
    p.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="GPUs that share each pair (default: grid_parallel_size of the configuration's strategy, else 1)",
    )
    p.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    p.add_argument("-v", "--verbose", action="store_true", help="say more, and where an error came from")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress bars")
    p.set_defaults(command=_memory, more=[])


def _memory(options: argparse.Namespace) -> None:
    _check(options)
    from patchreg.cli.experiment import read_experiment
    from patchreg.errors import InputError
    from patchreg.training import RegistrationModule
    from patchreg.training.estimate import inference_peak, needed_bytes, training_peak
    from patchreg.training.proposals import propose

    experiment = read_experiment(options.config, options.more)
    module = experiment.model
    if not isinstance(module, RegistrationModule):
        raise InputError(
            f"{options.config[0]}: the memory of a {type(module).__name__} cannot be estimated, only that of a "
            "RegistrationModule; patchreg fit tells the peak of a run at its end"
        )
    setting, source = _setting(experiment, module.objective.labels is not None, options)
    device = _device_bytes(options)
    with progress_bars(not options.quiet and not options.json) as progress:
        training = training_peak(module, setting)
        inference = inference_peak(module, setting)
        fits = device is None or needed_bytes(training) <= device
        proposals: list[Proposal] = []
        if device is not None and not fits:
            cascade = _arguments(experiment.config["model"])["cascade"]
            proposals = propose(module, cascade, setting, lambda peak: needed_bytes(peak) <= device, progress=progress)
    found = _summary(options, experiment, setting, source, device, training, inference, proposals)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        print_report(found)


def _check(options: argparse.Namespace) -> None:
    from patchreg.errors import InputError

    size, shape, spacing = options.device_gb, options.image_shape, options.image_spacing
    if size is not None and not 0 < size < math.inf:
        raise InputError(f"--device-gb must be a positive number, got {size:g}")
    if shape is not None and min(shape) < 1:
        raise InputError(f"--image-shape must be three positive numbers of voxels, got {' '.join(map(str, shape))}")
    if options.ranks is not None and options.ranks < 1:
        raise InputError(f"--ranks must be a positive number of GPUs, got {options.ranks}")
    if spacing is not None and (len(spacing) not in (1, 3) or not all(0 < s < math.inf for s in spacing)):
        raise InputError(
            f"--image-spacing must be one or three positive numbers in mm, got {' '.join(map(str, spacing))}"
        )


def _setting(experiment: Experiment, labelled: bool, options: argparse.Namespace) -> tuple[Setting, str]:
    """What memory depends on, and where the image's shape comes from; ``labelled``: the objective needs label maps."""
    import torch

    from patchreg.datasets import PairDataModule
    from patchreg.datasets.example import Example
    from patchreg.spatial import Grid
    from patchreg.training.estimate import Setting

    data, trainer = experiment.data, experiment.config.get("trainer", {})
    example = data.example() if isinstance(data, PairDataModule) else Example("the configuration has no data")
    known, source = example.grid, example.source
    shape = options.image_shape or (known.shape if known else DEFAULT_SHAPE)
    spacing = options.image_spacing or (known.spacing if known else DEFAULT_SPACING)
    if options.image_shape or options.image_spacing:
        source = "as given"
    elif known is None:
        source = f"assumed, as the data are not there: {source}"
    labels = example.labels
    if known is None and labels is None and labelled:
        labels = torch.int32
    return Setting(
        Grid.aligned((0.0, 0.0, 0.0), shape, spacing[0] if len(spacing) == 1 else spacing),
        getattr(data, "batch_size", 1),
        _precision(trainer.get("precision")),
        labels,
        getattr(data, "augmentation", None),
        trainer.get("accelerator", "auto") != "cpu",
        _ranks(trainer) if options.ranks is None else options.ranks,
    ), source


def _ranks(trainer: dict[str, Any]) -> int:
    """How many GPUs share a pair, by the trainer's strategy."""
    strategy, devices = trainer.get("strategy"), trainer.get("devices")
    everyone = (devices if isinstance(devices, int) else 1) * int(trainer.get("num_nodes") or 1)
    if isinstance(strategy, dict) and str(strategy.get("class_path", "")).endswith("GridParallelStrategy"):
        return int((strategy.get("init_args") or {}).get("grid_parallel_size") or everyone)
    return everyone if strategy == "grid_parallel" else 1


def _precision(given: str | int | None) -> Any:
    """What autocast computes in under Lightning's name of a precision; None: float32 throughout."""
    import torch

    from patchreg.errors import InputError

    known = {
        None: None, "32": None, "32-true": None, "bf16": torch.bfloat16, "bf16-mixed": torch.bfloat16,
        "16": torch.float16, "16-mixed": torch.float16,
    }  # fmt: skip
    key = None if given is None else str(given)
    if key not in known:
        raise InputError(f"trainer.precision {given!r} cannot be estimated: only 32, bf16-mixed and 16-mixed")
    return known[key]


def _device_bytes(options: argparse.Namespace) -> int | None:
    import torch

    if options.device_gb is not None:
        return int(options.device_gb * GIB)
    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def _arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Of a class, given with its path or without."""
    found: dict[str, Any] = config.get("init_args", config)
    return found


def _summary(
    options: argparse.Namespace,
    experiment: Experiment,
    setting: Setting,
    source: str,
    device: int | None,
    training: Peak,
    inference: tuple[Peak, Peak],
    proposals: list[Proposal],
) -> dict[str, Any]:
    from patchreg.training.estimate import Peak, needed_bytes

    def peak(of: Peak) -> dict[str, Any]:
        return {"kinds": of.kinds, "total": of.total, "host": of.host, "needed": needed_bytes(of)}

    # validation has images and fields on the device, beside the optimiser
    validation = Peak({**inference[0].kinds, "optimizer": training.kinds.get("optimizer", 0)})
    return {
        "config": [str(path) for path in options.config],
        "image": {"shape": list(setting.grid.shape), "spacing_mm": list(setting.grid.spacing), "source": source},
        "batch_size": setting.batch_size,
        "ranks": setting.ranks,
        "precision": str(experiment.config.get("trainer", {}).get("precision") or "32"),
        "device": {"kind": "gpu" if setting.gpu else "cpu", "bytes": device},
        "training": peak(training),
        "inference": peak(inference[0]),
        "inference_images_on_host": peak(inference[1]),
        "validation": peak(validation),
        "fits": None if device is None else needed_bytes(training) <= device,
        "proposals": [{"changes": _places(p.changes), "training": peak(p.peak)} for p in proposals],
    }


def _places(changes: Changes) -> dict[str, Any]:
    """Changes by their full place in the configuration."""
    known = {"batch_size": "data.init_args.batch_size", "precision": "trainer.precision"}
    return {
        known.get(place) or f"{STAGES}stages[{place.replace('.', '].', 1)}": value for place, value in changes.items()
    }
