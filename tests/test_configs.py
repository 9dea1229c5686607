"""Every experiment that ships parses and builds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY

from patchreg.cli.lightning import RunCLI
from patchreg.datasets import PairDataModule, SuperResolutionDataModule
from patchreg.training import RegistrationModule, SuperResolutionModule

EXPERIMENTS = sorted((REPOSITORY / "configs" / "experiment").glob("*.yaml"))


def build(path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> RunCLI:
    monkeypatch.setattr(sys, "argv", ["patchreg"])
    monkeypatch.chdir(folder)
    registers = SuperResolutionModule.__name__ not in path.read_text()
    return RunCLI(
        args=[
            "--config",
            str(path),
            *(["--model.init_args.initial_model", "null"] if registers else []),
            "--trainer.logger",
            "false",
            "--trainer.accelerator",
            "cpu",
        ],
        run=False,
        save_config_callback=None,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
    )


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiment_builds(path, monkeypatch, tmp_path):
    cli = build(path, monkeypatch, tmp_path)
    data = {RegistrationModule: PairDataModule, SuperResolutionModule: SuperResolutionDataModule}
    assert isinstance(cli.datamodule, data[type(cli.model)])
    assert cli.model.optimization.learning_rate > 0


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_experiment_logs_where_it_says_and_keeps_what_resuming_needs(path):
    text = path.read_text()
    config = yaml.safe_load(text)
    assert text.startswith("#"), "a first line says what it is for"
    trainer = config["trainer"]
    names = {logger["init_args"]["name"] for logger in trainer["logger"]}
    assert len(names) == 1
    assert [logger["class_path"].rsplit(".", 1)[1] for logger in trainer["logger"]] == ["CSVLogger", "WandbLogger"]
    assert trainer["logger"][1]["init_args"]["offline"] is True
    files = [
        c["init_args"].get("filename") for c in trainer["callbacks"] if c["class_path"].endswith("ModelCheckpoint")
    ]
    assert files == ["best", "last"]
    assert "max_steps" in trainer or "max_epochs" in trainer


def test_any_contrast_is_the_same_model_in_every_step(monkeypatch, tmp_path):
    """The steps of its training build the very tensors that the shipped cascade has."""
    shapes = {}
    for step in ("1_affine", "2_whole", "3_patches"):
        cli = build(REPOSITORY / "configs" / "experiment" / f"any_contrast_{step}.yaml", monkeypatch, tmp_path)
        shapes[step] = {name: tuple(t.shape) for name, t in cli.model.cascade.state_dict().items()}
    tuning = build(REPOSITORY / "configs" / "experiment" / "own_images.yaml", monkeypatch, tmp_path).model.cascade
    full = {name: tuple(t.shape) for name, t in tuning.state_dict().items()}
    assert shapes["3_patches"] == full
    for step in ("1_affine", "2_whole"):
        assert shapes[step].items() <= full.items()
    assert all(p.requires_grad for p in tuning.parameters())
    assert sum(t.numel() for t in tuning.state_dict().values()) * 4 < 10e6
    assert all(torch.isfinite(t).all() for t in tuning.state_dict().values())
