"""Runs of the whole of Lightning, on tiny phantoms."""

from __future__ import annotations

import csv
import json
import sys
import time

import pytest
import torch
import yaml

from patchreg import load_model
from patchreg.cli.main import main
from patchreg.io import read_transform

CASCADE = {
    "class_path": "patchreg.cascade.PatchCascade",
    "init_args": {
        "stages": [
            {
                "class_path": "patchreg.cascade.Stage",
                "init_args": {
                    "predicts": "affine",
                    "patch_shape": 16,
                    "network": {
                        "class_path": "patchreg.networks.KeypointAffine",
                        "init_args": {"encoder": [4, 8], "decoder": [8], "keypoints": 8},
                    },
                },
            },
            {
                "class_path": "patchreg.cascade.Stage",
                "init_args": {
                    "patch_shape": 16,
                    "network": {
                        "class_path": "patchreg.networks.VoxelMorph",
                        "init_args": {"encoder": [4, 8], "decoder": [8], "final": []},
                    },
                },
            },
        ]
    },
}


def experiment(folder, steps=4, **trainer):
    config = {
        "seed_everything": 3,
        "model": {
            "class_path": "patchreg.training.RegistrationModule",
            "init_args": {
                "cascade": CASCADE,
                "objective": {
                    "similarity": {"class_path": "patchreg.losses.LNCC", "init_args": {"window": 5}},
                    "regularity": {"class_path": "patchreg.losses.Diffusion"},
                    "labels": [2, 3, 41, 42],
                    "overlap_weight": 1.0,
                    "centroid_weight": 1.0,
                },
                "optimization": {"warmup_steps": 2},
            },
        },
        "data": {
            "class_path": "patchreg.datasets.SynthesisDataModule",
            "init_args": {"phantoms": 6, "phantom_spacing_mm": 6.0, "pairs_per_epoch": 2, "validation_pairs": 1},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "logger": [
                {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(folder), "name": "run"},
                },
            ],
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"monitor": "val/dice", "mode": "max", "filename": "best"},
                },
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "last", "enable_version_counter": False},
                },
                {"class_path": "patchreg.training.Pictures", "init_args": {"pairs": 1}},
            ],
            **trainer,
        },
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def no_argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["patchreg"])


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("no_argv")
def test_a_run_leaves_all_that_is_promised(tmp_path):
    assert main(["fit", "--config", str(experiment(tmp_path))]) == 0
    run = tmp_path / "run" / "version_0"
    found = {p.name for p in run.iterdir()}
    assert {"config.yaml", "metrics.csv", "checkpoints", "model", "pictures"} <= found
    logged = {k for row in rows(run) for k, v in row.items() if v}
    assert {"train/loss", "train/stage0/centroids_mm", "train/stage1/overlap", "train/stage1/regularity"} <= logged
    assert {
        "val/dice",
        "val/dice_before",
        "val/dice_affine",
        "val/similarity",
        "val/folding_percent",
        "val/centroids_mm",
    } <= logged
    assert "memory/host_peak_mib" in logged
    pictures = sorted((run / "pictures").iterdir())
    assert len(pictures) == 2
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    # the saved configuration runs again, and the saved model loads
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["optimization"]["warmup_steps"] == 2
    best = torch.load(next((run / "checkpoints").glob("best.ckpt")), weights_only=True)
    model = load_model(run / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(best["state_dict"][f"cascade.{name}"], tensor)


@pytest.mark.usefixtures("no_argv")
def test_resuming_continues_where_the_run_stopped(tmp_path):
    """Four steps, continued to eight: the optimiser goes on, and the schedule is that of eight steps in one run."""
    assert main(["fit", "--config", str(experiment(tmp_path, steps=4))]) == 0
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 4
    longer = experiment(tmp_path, steps=8)
    assert main(["fit", "--config", str(longer), "--ckpt_path", str(last)]) == 0
    resumed = torch.load(tmp_path / "run" / "version_1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == 8
    assert resumed["epoch"] > state["epoch"]
    moments = [s["optimizer_states"][0]["state"][0]["step"] for s in (state, resumed)]
    assert [float(m) for m in moments] == [4.0, 8.0]
    assert main(["fit", "--config", str(longer)]) == 0
    straight = torch.load(tmp_path / "run" / "version_2" / "checkpoints" / "last.ckpt", weights_only=True)
    rates = [s["optimizer_states"][0]["param_groups"][0]["lr"] for s in (resumed, straight)]
    assert rates[0] == rates[1] < 1e-3


@pytest.mark.usefixtures("no_argv")
def test_validate_test_and_predict(tmp_path):
    config = str(experiment(tmp_path))
    assert main(["fit", "--config", config]) == 0
    checkpoint = str(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt")
    for command in ("validate", "test", "predict"):
        assert main([command, "--config", config, "--ckpt_path", checkpoint]) == 0
    written = sorted(tmp_path.glob("run/version_*/predictions/*.h5"))
    assert [p.name for p in written] == ["0000.h5"]
    assert len(read_transform(written[0]).transforms) >= 2


@pytest.mark.usefixtures("no_argv")
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_same_seed_same_run(tmp_path, precision):
    for _ in range(2):
        assert main(["fit", "--config", str(experiment(tmp_path, precision=precision))]) == 0
    losses = [[r["train/loss"] for r in rows(tmp_path / "run" / f"version_{v}") if r["train/loss"]] for v in (0, 1)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.usefixtures("no_argv")
def test_fine_tuning_starts_from_a_model(tmp_path):
    assert main(["fit", "--config", str(experiment(tmp_path))]) == 0
    model = tmp_path / "run" / "version_0" / "model"
    config = yaml.safe_load(experiment(tmp_path).read_text())
    config["model"]["init_args"]["initial_model"] = str(model)
    config["model"]["init_args"]["optimization"]["learning_rate"] = 1e-12
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(path)]) == 0
    before, after = load_model(model).state_dict(), load_model(tmp_path / "run" / "version_1" / "model").state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@pytest.mark.usefixtures("no_argv")
def test_wandb_offline_gets_metrics_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"save_dir": str(tmp_path), "project": "test", "name": "run", "offline": True},
    }
    assert main(["fit", "--config", str(experiment(tmp_path, logger=[logger]))]) == 0
    import wandb

    wandb.finish()
    images = [p for p in tmp_path.rglob("*.png") if "media" in p.parts]
    assert len(images) == 2
    summaries = list(tmp_path.rglob("*.wandb"))
    assert len(summaries) == 1
    until = time.monotonic() + 60  # wandb's own process writes, and on a busy machine lags behind
    while b"val/dice" not in summaries[0].read_bytes() and time.monotonic() < until:
        time.sleep(0.2)
    assert b"val/dice" in summaries[0].read_bytes()


@pytest.mark.usefixtures("no_argv")
def test_bad_input_to_training_is_one_sentence(tmp_path, capsys):
    config = yaml.safe_load(experiment(tmp_path).read_text())
    config["data"]["init_args"]["manifest"] = str(tmp_path / "missing.csv")
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(path)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"patchreg: {tmp_path / 'missing.csv'}: no such manifest; give a CSV or JSON file"
    config["data"]["init_args"]["manifest"] = None
    config["trainer"]["max_steps"] = -1
    config["trainer"]["max_epochs"] = -1
    path.write_text(json.dumps(config))
    assert main(["fit", "--config", str(path)]) == 2
    assert "training has no end" in capsys.readouterr().err
