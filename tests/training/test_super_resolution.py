from __future__ import annotations

import csv

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import wandb
from torch import nn

from patchreg.cli.main import main
from patchreg.datasets import SuperResolutionDataModule, Synthesis
from patchreg.errors import InputError
from patchreg.networks import ESPCN
from patchreg.training import Optimization, SuperResolutionModule
from patchreg.training.super_resolution import middle


def data() -> SuperResolutionDataModule:
    clean = Synthesis(thick_probability=0.0, blur_mm=1.0, noise=0.0, texture=0.0)
    return SuperResolutionDataModule(
        phantoms=10, phantom_spacing_mm=3.0, patches_per_image=64, validation_patches=16, synthesis=clean
    )


def test_a_short_run_beats_trilinear_interpolation(tmp_path):
    L.seed_everything(1)
    module = SuperResolutionModule(ESPCN(1), Optimization(learning_rate=3e-3, warmup_steps=5))
    trainer = L.Trainer(
        max_steps=150, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, check_val_every_n_epoch=100, num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    source = data()
    trainer.fit(module, source)
    (found,) = trainer.validate(module, source, verbose=False)
    assert found["val/psnr"] > found["val/psnr_trilinear"] + 0.2
    assert found["val/rmse"] < found["val/rmse_trilinear"]
    assert found["val/psnr"] == pytest.approx(-20 * torch.tensor(found["val/rmse"]).log10().item(), abs=1e-3)


def test_trilinear_is_what_torch_interpolates(tmp_path):
    """A network that interpolates has the same figures in both columns."""

    class Trilinear(nn.Module):
        def forward(self, low: torch.Tensor) -> torch.Tensor:
            return F.interpolate(low, scale_factor=2, mode="trilinear")[..., 4:-4, 4:-4, 4:-4]

    module = SuperResolutionModule(Trilinear())
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    (found,) = trainer.validate(module, data(), verbose=False)
    assert found["val/psnr"] == found["val/psnr_trilinear"]


def test_command_line(tmp_path, monkeypatch):
    """With reversible blocks, from the shipped configuration."""
    from conftest import REPOSITORY

    monkeypatch.chdir(tmp_path)
    arguments = (
        "--model.network.init_args.blocks 4 --model.network.init_args.memory reversible --data.phantoms 6 "
        "--data.phantom_spacing_mm 6 --data.patches_per_image 4 --data.batch_size 4 --data.validation_patches 4 "
        "--trainer.max_steps 2 --trainer.max_epochs 1 --trainer.check_val_every_n_epoch 1 --trainer.accelerator cpu "
        "--trainer.enable_progress_bar false --trainer.log_every_n_steps 1"
    )
    config = str(REPOSITORY / "configs" / "experiment" / "espcn.yaml")
    assert main(["fit", "--config", config, *arguments.split()]) == 0
    wandb.finish()
    (folder,) = (tmp_path / "runs" / "espcn").iterdir()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert any(row["val/psnr"] and row["val/psnr_trilinear"] and row["val/rmse"] for row in rows)


def test_data_and_network_that_do_not_belong_together_are_refused():
    low, high = torch.zeros(1, 1, 11, 11, 11), torch.zeros(1, 1, 22, 22, 22)
    assert middle(high, ESPCN(1)(low)).shape == (1, 1, 14, 14, 14)
    for network in (ESPCN(1, 3), ESPCN(1, 4, padding=True)):
        with pytest.raises(InputError, match="use the same channels and upsampling"):
            middle(high, network(low))
