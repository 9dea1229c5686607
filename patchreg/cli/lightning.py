"""``patchreg fit | validate | test | predict``: Lightning's command line."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.cli import LightningCLI

import patchreg.distributed.strategy  # noqa: F401  trainer.strategy: grid_parallel
from patchreg.training import PeakMemory, SaveRun, TransformWriter


class RunCLI(LightningCLI):
    """LightningCLI that saves the model as a folder and writes predicted transforms."""

    def predict(self, model: Any, **options: Any) -> None:
        """Transforms are written as they are found, and not kept."""
        self.trainer.predict(model, **{**options, "return_predictions": False})


def run(arguments: list[str]) -> Any:
    """Run one of Lightning's subcommands."""
    return RunCLI(
        save_config_callback=SaveRun,
        trainer_defaults={"callbacks": [PeakMemory(), TransformWriter()]},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=None if arguments == sys.argv[1:] else arguments,  # Lightning warns where both are given
    )
