"""Callbacks: pictures, memory, and the model as a folder that ``patchreg register`` takes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from patchreg.cascade import Result
from patchreg.cascade.storage import save_cascade
from patchreg.datasets import Pair
from patchreg.io import staged_file, write_transform
from patchreg.memory import peak_mib
from patchreg.spatial import collapse
from patchreg.training.evaluation import Evaluation
from patchreg.training.module import RegistrationModule
from patchreg.visual import pixels, registration_figure

log = logging.getLogger(__name__)


def run_folder(trainer: L.Trainer) -> Path:
    """Where a run keeps its files. Every rank must ask: they agree on it together."""
    return Path(trainer.log_dir or trainer.default_root_dir)


class Pictures(L.Callback):
    """Pictures of the first validation pairs: fixed, moving, moved, checkerboards, grid, log-Jacobian, uncertainty.

    They go to Weights & Biases where that is the logger, and as PNG files into the run's folder in any case.

    Args:
        pairs: how many.
        every_epochs: validations between pictures.
    """

    def __init__(self, pairs: int = 2, every_epochs: int = 1) -> None:
        self.pairs, self.every_epochs = pairs, every_epochs

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking or batch_idx >= self.pairs or trainer.current_epoch % self.every_epochs:
            return
        folder = run_folder(trainer) / "pictures"
        if getattr(trainer.strategy, "data_rank", trainer.global_rank) > 0:
            return  # all ranks that share the first pair draw it together
        for evaluation in outputs:
            self._draw(trainer, evaluation, folder, f"pair_{batch_idx}")

    def _draw(self, trainer: L.Trainer, evaluation: Evaluation, folder: Path, name: str) -> None:
        from PIL import Image

        pair, result = evaluation.pair, evaluation.result
        figure = registration_figure(
            pair.fixed.at(1.0),
            pair.moving.at(1.0),
            pair.initial,
            result.transform,
            pair.fixed.content,
            result.spread,
            pair.fixed_warp,
        )
        picture = pixels(figure)
        if not trainer.is_global_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{name}_step_{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                caption = ", ".join(f"{k} {v:.3f}" for k, v in evaluation.metrics.items())
                logger.log_image(f"val/{name}", [picture], step=trainer.global_step, caption=[caption])


class PeakMemory(L.Callback):
    """Logs the peak memory of every epoch, and says it at the end.

    On a GPU what torch allocated at most; on a CPU the largest resident size of the process so far.
    """

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for where, mib in peak_mib(pl_module.device).items():
            pl_module.log(f"memory/{where}_peak_mib", mib, rank_zero_only=True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = ", ".join(f"{mib:.0f} MiB on the {where}" for where, mib in peak_mib(pl_module.device).items())
        log.info("peak memory: %s", found)


class SaveRun(SaveConfigCallback):
    """Saves the run's configuration, and in the end its model as a folder: ``patchreg register --model RUN/model``.

    The folder holds the best checkpoint where one is kept by a metric, otherwise the last weights.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_folder(trainer) / "model"
        if not isinstance(pl_module, RegistrationModule) or not trainer.is_global_zero:
            return
        config = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=False))
        cascade = config["model"].get("init_args", config["model"])["cascade"]
        best = next((c.best_model_path for c in trainer.callbacks if isinstance(c, ModelCheckpoint) and c.monitor), "")  # type: ignore[attr-defined]
        if best:
            state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            pl_module.load_state_dict(state)
        for stage in cascade["init_args"]["stages"]:
            stage["init_args"].pop("frozen", None)  # of the training, not of the model
        save_cascade(folder, pl_module.cascade, cascade)
        log.info("model saved in %s", folder)


class TransformWriter(BasePredictionWriter):
    """Writes every predicted transform as an ITK composite, ``predictions/NNNN.h5``, as soon as it is found."""

    def __init__(self, folder: str = "predictions") -> None:
        super().__init__(write_interval="batch")
        self.folder, self._written = folder, 0

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: list[tuple[Pair, Result]],
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        root = run_folder(trainer) / self.folder
        share = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        self._written = 0 if batch_idx == 0 else self._written
        for pair, result in prediction:
            number = share["num_replicas"] * self._written + share["rank"]
            self._written += 1
            transform = collapse(result.transform, pair.fixed.grid.whole)
            if getattr(trainer.strategy, "grid_rank", 0) == 0:  # of the ranks that share a pair one writes
                with staged_file(root / f"{number:04d}.h5") as path:
                    write_transform(path, transform)
