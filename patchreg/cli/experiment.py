"""An experiment's model and data, built from its configuration without a trainer."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError

from patchreg.cli.lightning import RunCLI
from patchreg.errors import InputError


@dataclass(frozen=True, eq=False)
class Experiment:
    """What a configuration describes.

    Args:
        model: with fresh weights.
        data: None where the configuration has none.
        config: of ``model``, ``data`` and ``trainer``, every setting with its value.
    """

    model: L.LightningModule
    data: L.LightningDataModule | None
    config: dict[str, Any]


class _Parts(RunCLI):
    """Reads what ``patchreg fit`` reads, and builds the model and the data alone: no trainer, no logger, no weights."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)
        super().__init__(
            run=False,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False},
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        for name in (
            "--ckpt_path",
            "--weights_only",
            "--verbose",
            "--return_predictions",
        ):  # a run's own config has them
            parser.add_argument(name, type=Any)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        self.config = parser.parse_args(self._arguments)
        self.described = yaml.safe_load(parser.dump(self.config, skip_link_targets=False))
        self.config["seed_everything"] = False
        self.config.trainer.logger, self.config.trainer.callbacks = False, None
        if "initial_model" in self.config.model.get("init_args", {}):
            self.config.model.init_args.initial_model = None

    def instantiate_classes(self) -> None:
        built = self.parser.instantiate(self.config)
        self.model, self.datamodule = built.model, built.get("data")


def read_experiment(configs: Sequence[Path], overrides: Sequence[str] = ()) -> Experiment:
    """Build the model and the data of an experiment.

    Args:
        configs: files as ``patchreg fit --config`` takes them; later ones override earlier ones.
        overrides: further options, as ``patchreg fit`` takes them.

    Raises:
        InputError: a file that is not there, or that describes no experiment.
    """
    for path in configs:
        if not path.is_file():
            raise InputError(f"{path}: no such configuration; see configs/experiment")
    names = ", ".join(str(path) for path in configs)
    arguments = [word for path in configs for word in ("--config", str(path))]
    try:
        with _quiet():
            parts = _Parts([*arguments, *overrides])
    except InputError:
        raise
    except (ArgumentError, ValueError, TypeError, KeyError, AttributeError, ImportError, OSError) as error:
        raise InputError(f"{names}: describes no experiment ({_reason(error)})") from error
    return Experiment(parts.model, parts.datamodule, parts.described)


def _reason(error: Exception) -> str:
    """What is wrong, out of all that the parser tells of the types that it tried."""
    text = " ".join(str(error).split())
    found = re.search(r".*Problem with (.+?)(?: - Expected a | Given value|$)", text)
    return (found[1] if found else text)[:500]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning says what it seeds and finds; nobody asked."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
