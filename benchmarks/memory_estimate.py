"""The peak memory that ``patchreg memory`` tells, beside what training in Lightning's own loop takes.

    python benchmarks/memory_estimate.py

Measured is the second step: images, sampling, networks, losses, backward pass and optimiser are real. ``live`` are the
bytes of all tensors that exist at one time, which is what the estimate is of; ``allocated`` what torch's allocator gave
out at most, with what operators take inside themselves. On a GPU (``--device cuda``) both come from its allocator.
Correctness first: a loss must be finite. A ratio is the estimate divided by what was measured.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import torch
from common import table, write_results
from torch.utils.data import DataLoader

from patchreg.cascade.storage import build_cascade
from patchreg.cli.experiment import read_experiment
from patchreg.datasets import Pair, phantom
from patchreg.datasets.files import augmented
from patchreg.datasets.pair import collate
from patchreg.memory import MemoryLog
from patchreg.ops.workspace import workspace
from patchreg.resources import resource_folder
from patchreg.spatial import Grid, MappedGrid, Volume
from patchreg.training.estimate import Setting, training_peak

CHECKPOINT = {"memory": "checkpoint"}


@dataclass(frozen=True)
class Case:
    """An experiment at an image's shape, with other settings for every deformable network."""

    experiment: str
    shape: tuple[int, int, int]
    spacing: float
    precision: str = "32"
    network: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None


CASES = (
    Case("quickstart", (48, 56, 52), 4.0),
    Case("quickstart", (48, 56, 52), 4.0, "bf16-mixed"),
    Case("quickstart", (48, 56, 52), 4.0, network=CHECKPOINT),
    Case("voxelmorph_full", (64, 72, 80), 2.5),
    Case("voxelmorph_full", (64, 72, 80), 2.5, "bf16-mixed"),
    Case("voxelmorph_full", (64, 72, 80), 2.5, network=CHECKPOINT),
    Case("voxelmorph_reversible", (64, 72, 80), 2.5),
    Case("voxelmorph_full", (160, 192, 224), 1.0, "bf16-mixed"),
    Case("transmorph_full", (80, 96, 112), 2.0),
    Case("transmorph_full", (80, 96, 112), 2.0, "bf16-mixed", {"memory": "stored"}),
    Case("transmorph_patches", (160, 192, 176), 1.0),
    Case("any_contrast_3_patches", (160, 192, 176), 1.0),
    Case("any_contrast_3_patches", (160, 192, 176), 1.0, "bf16-mixed"),
    Case("any_contrast_3_patches", (160, 192, 176), 1.0, network=CHECKPOINT),
)


def build(case: Case) -> tuple[L.LightningModule, Setting]:
    """A case's model, and what the estimate is told of it."""
    path = resource_folder("configs") / "experiment" / f"{case.experiment}.yaml"
    experiment = read_experiment([path])
    if case.network:
        config = experiment.config["model"]["init_args"]["cascade"]
        for stage in config["init_args"]["stages"]:
            if stage["init_args"]["predicts"] != "affine":
                stage["init_args"]["network"]["init_args"].update(case.network)
        experiment.model.cascade = build_cascade({"cascade": config})
    data = experiment.data
    setting = Setting(
        Grid.aligned((0.0, 0.0, 0.0), case.shape, case.spacing),
        case.batch_size or data.batch_size,
        torch.bfloat16 if case.precision == "bf16-mixed" else None,
        data.example().labels,
        data.augmentation,
        gpu=False,
    )
    return experiment.model, setting


def made_pair(setting: Setting, seed: int) -> Pair:
    """Two heads at the setting's shape, with all that it says they have."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for offset in (0, 1):
        head = phantom(2 * seed + offset, 4.0)
        labels = MappedGrid.identity(setting.grid).sample(head, mode="nearest")[0]
        image = labels.float().remainder(37) + torch.rand(labels.shape, generator=generator)
        kept = None if setting.labels is None else Volume(labels.to(setting.labels), setting.grid)
        sides.append((Volume(image, setting.grid), kept))
    (fixed, fixed_labels), (moving, moving_labels) = sides
    return augmented(fixed, moving, fixed_labels, moving_labels, setting.augmentation, generator, f"pair {seed}")


class Measure(L.Callback):
    """Peaks of the second step."""

    def __init__(self, allocated: bool = False) -> None:
        self.allocated = allocated
        self.found: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != 1:
            return
        gc.collect()
        self.base = held(trainer, pl_module, batch)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif self.allocated:
            self.profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self.profiler.start()
        else:
            self.log_ = MemoryLog(workspace)
            self.log_.__enter__()
            for tensor in self.base:
                self.log_.track(tensor)
            self.log_.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx != 1:
            return
        assert torch.isfinite(outputs["loss"]), "the loss is not finite"
        if pl_module.device.type == "cuda":
            self.found["peak"] = torch.cuda.max_memory_allocated()
        elif self.allocated:
            self.profiler.stop()
            self.found["peak"] = sum(t.untyped_storage().nbytes() for t in self.base) + allocator_peak(self.profiler)
        else:
            self.log_.__exit__(None, None, None)
            self.found["peak"] = sum(self.log_.at_peak().values())


def held(trainer: L.Trainer, module: L.LightningModule, batch: list[Pair]) -> list[torch.Tensor]:
    """One tensor of every storage that exists before a step."""
    tensors = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)]
    for optimizer in trainer.optimizers:
        tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    for pair in batch:
        volumes = (pair.fixed, pair.moving, pair.fixed_labels, pair.moving_labels)
        tensors += [v.data for v in volumes if v is not None]
        tensors += [w.displacement_mm for w in (pair.fixed_warp, pair.moving_warp) if hasattr(w, "displacement_mm")]
    return list({t.untyped_storage()._cdata: t for t in tensors}.values())


def allocator_peak(profiler: Any) -> int:
    """The most bytes that were given out at one time since the profile began."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def measure(case: Case, device: str = "cpu", allocated: bool = False) -> float:
    """Bytes at the peak of the second step of training."""
    torch.manual_seed(0)
    module, setting = build(case)
    pairs = [made_pair(setting, seed) for seed in range(2 * setting.batch_size)]
    callback = Measure(allocated)
    trainer = L.Trainer(
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        precision=case.precision,
        max_steps=2,
        gradient_clip_val=5.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, DataLoader(pairs, setting.batch_size, collate_fn=collate))
    return callback.found["peak"]


def compare(case: Case, device: str, allocated: bool) -> dict[str, Any]:
    """A row of the table."""
    start = time.perf_counter()
    module, setting = build(case)
    built = time.perf_counter() - start
    setting = replace(setting, gpu=device != "cpu")
    start = time.perf_counter()
    estimate = training_peak(module, setting).total
    seconds = time.perf_counter() - start
    row = {
        "experiment": case.experiment,
        "image": "x".join(map(str, case.shape)),
        "precision": case.precision,
        "memory": case.network.get("memory", "as configured"),
        "estimate MiB": round(estimate / 2**20, 1),
        "seconds to build": round(built, 2),
        "seconds": round(seconds, 2),
    }
    if device == "cpu":
        live = measure(case)
        row |= {"live MiB": round(live / 2**20, 1), "ratio": round(estimate / live, 3)}
    if device != "cpu" or allocated:
        found = measure(case, device, True)
        row |= {"allocated MiB": round(found / 2**20, 1), "ratio to it": round(estimate / found, 3)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="experiments whose name contains this")
    parser.add_argument("--largest", type=float, default=8.0, metavar="MILLIONS", help="of voxels in an image")
    parser.add_argument("--no-allocated", action="store_true", help="leave out the run under the allocator's profile")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        if options.only in case.experiment and torch.Size(case.shape).numel() <= 1e6 * options.largest:
            rows.append(compare(case, options.device, not options.no_allocated))
            print(table(rows[-1:], list(rows[-1])).splitlines()[-1], flush=True)
    print(table(rows, list(rows[0])))
    if not options.only:
        print(write_results(f"memory_estimate_{options.device}", rows))


if __name__ == "__main__":
    main()
