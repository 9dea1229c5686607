"""One command, several processes: started by patchreg, or by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import blobs, known_transform
from inference_parts import save
from ranks.failing import Options, die, raise_error

from patchreg.cli.main import main
from patchreg.cli.processes import Place, check_devices, find_place, start
from patchreg.errors import InputError, RankLost
from patchreg.inference.registration import resample
from patchreg.spatial import Affine, Grid


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small pair, and a file with a bad voxel in its last plane."""
    folder = tmp_path_factory.mktemp("files")
    source = blobs(Grid.aligned((0, 0, 0), (30, 30, 30), 2.0), width_mm=5.0)
    fixed = resample(source, Affine.identity(), Grid.aligned((0, 0, 0), (26, 22, 20), (1.6, 1.9, 2.0)))
    moving = resample(source, known_transform(size_mm=2.0), Grid.aligned((1, 0, 0), (21, 20, 24), (2.0, 2.0, 1.7)))
    save(fixed, folder / "fixed.nii.gz")
    save(moving, folder / "moving.nii", np.int16)
    fixed.data[0, -1, 3, 3] = torch.nan
    save(fixed, folder / "broken.nii")
    return folder


def arguments(files, out, *more, fixed="fixed.nii.gz"):
    given = ["register", "--fixed", files / fixed, "--moving", files / "moving.nii", "-o", out, *more]
    return [str(word) for word in given]


def test_two_processes_register_a_pair(files, tmp_path, capfd):
    """With the model of the zoo."""
    out = tmp_path / "out"
    assert main(arguments(files, out, "--devices", 2, "--device", "cpu", "--no-refine")) == 0
    printed = capfd.readouterr()
    assert printed.out.count("results in") == 1
    assert printed.err.count("affine") == 1  # the bars of one process
    assert "Terminating" not in printed.err
    summary = json.loads((out / "summary.json").read_text())
    assert summary["devices"] == 2
    assert summary["similarity"]["after"] > summary["similarity"]["before"]
    assert nib.load(out / "moved.nii").shape == (26, 22, 20)
    assert nib.load(out / "displacement.nii").shape == (26, 22, 20, 1, 3)
    applied = ["apply", out / "displacement.nii", files / "moving.nii", "--reference", files / "fixed.nii.gz"]
    assert main([*map(str, applied), "-o", str(tmp_path / "again.nii")]) == 0
    again = nib.load(tmp_path / "again.nii").get_fdata()
    assert np.abs(again - nib.load(out / "moved.nii").get_fdata()).max() <= 1


def test_bad_input_is_told_once_and_nothing_is_left(files, tmp_path, capfd):
    """Only the last process reads the bad voxel."""
    given = arguments(files, tmp_path / "a" / "out", "--devices", 2, "--device", "cpu", "-q", fixed="broken.nii")
    assert main(given) == 2
    said = capfd.readouterr().err
    assert said.count("NaN") == 1
    assert said.startswith("patchreg: ")
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_torchrun(files, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "patchreg",
    ]
    given = arguments(files, tmp_path / "out", "--transform", "affine", "--no-refine", "--device", "cpu")
    done = subprocess.run([*launcher, *given], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == 1
    assert (tmp_path / "out" / "moved.nii").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (die, "process 1 of 2 was ended by SIGKILL; perhaps there was not enough memory"),
        (raise_error, "process 0 of 2 failed .KeyError: 'what nobody thought of'"),
    ],
)
def test_a_process_that_fails_ends_all(work, words, capfd):
    with pytest.raises(RankLost, match=words):
        start(2, work, Options())
    assert capfd.readouterr().err.count("Traceback") == (1 if work is raise_error else 0)


def test_devices_that_cannot_be_had(monkeypatch, files, tmp_path, capsys):
    with pytest.raises(InputError, match="at least 1, got 0"):
        check_devices(0, "auto", None)
    with pytest.raises(InputError, match="cuda:1 names one device, but 2 were asked for"):
        check_devices(2, "cuda:1", None)
    with pytest.raises(InputError, match="one of 4 processes"):
        check_devices(2, "cpu", Place(0, 4, 0, "env://"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="torch sees 2 GPUs"):
        check_devices(3, "auto", None)
    assert [check_devices(n, "auto", None) for n in (None, 1, 2)] == [1, 1, 2]
    assert check_devices(3, "cpu", None) == 3
    assert check_devices(None, "cpu", Place(0, 4, 0, "env://")) == 4
    monkeypatch.undo()
    assert main(arguments(files, tmp_path / "out", "--devices", -1)) == 2
    assert "--devices must be at least 1" in capsys.readouterr().err


def test_places(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert find_place() is None
    for name, value in (("SLURM_PROCID", "3"), ("SLURM_NTASKS", "4"), ("SLURM_LOCALID", "1")):
        monkeypatch.setenv(name, value)
    assert find_place() is None  # a batch script of four tasks, not one of them
    for name, value in (("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_NODELIST", "node[7-8]"), ("SLURM_JOB_ID", "12345")):
        monkeypatch.setenv(name, value)
    found = find_place()
    assert (found.rank, found.size, found.local_rank) == (3, 4, 1)
    assert found.method == "tcp://node7:17345"
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "12109", strict=True):
        monkeypatch.setenv(name, value)
    assert find_place() == Place(1, 2, 1, "env://")
