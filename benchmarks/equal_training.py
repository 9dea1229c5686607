"""The same TransMorph, trained equally long on whole volumes and inside the cascade: what it reaches, and what it takes.

    python benchmarks/equal_training.py [--steps 150] [--size small] [--spacing 3]

Made heads of 3 mm voxels (about 55x70x60), same contrast in a pair, deformed by up to 8 mm; other heads in validation.
Both get the same pairs in the same order, the same objective (LNCC and diffusion, no labels), optimiser and number of
steps. ``whole`` is one stage whose patch is the image. ``cascade`` is the same network twice: on the whole head in one patch,
then on patches at the images' spacing. Validation registers whole images; nothing is refined on the pair.
Memory is the peak of live tensors in the last training step, optimiser included; seconds are of training alone.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from typing import Any

import lightning as L
import torch
from common import table, write_results

from patchreg.cascade import PatchCascade, Stage
from patchreg.datasets import SynthesisDataModule, WorldAugmentation
from patchreg.datasets.phantom import BRAIN_LABELS
from patchreg.datasets.synthesis import Synthesis
from patchreg.losses import LNCC, Diffusion
from patchreg.memory import LivePeak
from patchreg.networks import TransMorph
from patchreg.training import Objective, RegistrationModule
from patchreg.training.module import Optimization

GROUPS = [(2, 41), (3, 42), (4, 43), (7, 46), (8, 47), (10, 49), (11, 50), (12, 51), (13, 52), (17, 53), (18, 54)]


class StepPeak(L.Callback):
    """Live tensors of the last training step, the weights, their gradients and the optimiser's state included."""

    def __init__(self, step: int) -> None:
        self.step, self.memory, self.peak_mib = step, None, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step == self.step - 1:
            gc.collect()
            self.memory = LivePeak()
            states = [
                t for s in trainer.optimizers[0].state.values() for t in s.values() if isinstance(t, torch.Tensor)
            ]
            for tensor in [*module.parameters(), *states]:
                self.memory.track(tensor)
            self.memory.__enter__()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if self.memory is not None:
            self.memory.__exit__(None, None, None)
            self.peak_mib, self.memory = self.memory.peak / 2**20, None


def cascades(size: str, patch: int, spacing: float) -> dict[str, PatchCascade]:
    """What is compared."""

    def network(memory: str) -> TransMorph:
        return TransMorph(size, window=(4, 4, 4), force_window=5, memory=memory)

    return {
        "whole, stored": PatchCascade([Stage(network("stored"), spacing="image")]),
        "cascade, checkpoint": PatchCascade(
            [
                Stage(network("checkpoint"), patch_shape=patch),
                Stage(network("checkpoint"), patch_shape=patch, spacing=spacing),
            ]
        ),
    }


def train(name: str, cascade: PatchCascade, steps: int, rate: float, spacing: float) -> dict[str, Any]:
    """Train and validate one model."""
    L.seed_everything(1, verbose=False)
    data = SynthesisDataModule(
        phantoms=20,
        phantom_spacing_mm=spacing,
        synthesis=Synthesis(GROUPS, strip_probability=0.0, same_contrast_probability=1.0, thick_probability=0.0),
        augmentation=WorldAugmentation(rotation_deg=2, translation_mm=2, scaling=0.02, deformation_mm=8),
        pairs_per_epoch=steps,
        validation_pairs=8,
    )
    module = RegistrationModule(
        cascade, Objective(LNCC(9), Diffusion(), labels=list(BRAIN_LABELS)), Optimization(rate, warmup_steps=20)
    )
    peak = StepPeak(steps)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[peak],
        num_sanity_val_steps=0, limit_val_batches=0, gradient_clip_val=5.0, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    judge = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = judge.validate(module, data, verbose=False)
    return {
        "model": name,
        "weights M": sum(p.numel() for p in cascade.parameters()) / 1e6,
        "steps": steps,
        "LNCC before": found["val/similarity_before"],
        "LNCC": found["val/similarity"],
        "Dice before": found["val/dice_before"],
        "Dice": found["val/dice"],
        "folding %": found["val/folding_percent"],
        "sd log J": found["val/jacobian_std"],
        "peak MiB": peak.peak_mib,
        "s / step": seconds / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--size", default="small")
    parser.add_argument("--patch", type=int, default=40)
    parser.add_argument("--spacing", type=float, default=3.0)
    parser.add_argument("--rate", type=float, default=1e-3)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    rows = []
    for name, cascade in cascades(options.size, options.patch, options.spacing).items():
        rows.append(train(name, cascade, options.steps, options.rate, options.spacing))
        print(rows[-1], flush=True)
    print(table(rows, list(rows[0])))
    print(
        write_results(
            "equal_training", rows, size=options.size, patch=options.patch, spacing=options.spacing, rate=options.rate
        )
    )


if __name__ == "__main__":
    main()
