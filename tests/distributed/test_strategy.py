"""Trainings whose volumes are split over processes are those of one process, and end together."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPOSITORY
from ranks.comparison import error, limit

from patchreg.datasets import Pair
from patchreg.distributed import GridParallelStrategy
from patchreg.distributed.batches import replaced, share_out
from patchreg.distributed.failures import broken, last_checkpoint
from patchreg.distributed.lifeline import Lifeline
from patchreg.errors import InputError
from patchreg.io import read_transform
from patchreg.spatial import Grid, Volume

FITS = REPOSITORY / "tests" / "ranks" / "fits.py"
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "PL_"))} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY / "tests"),
}
IMPATIENT = {"grace": 2.0, "patience": 1.0}


def experiment(path: Path, strategy: object, devices: int, pairs: int = 2) -> list[str]:
    """A command that trains a whole-volume network for three steps.

    Args:
        path: of the file that it needs.
        strategy: of the trainer.
        devices: processes.
        pairs: in an epoch, after which there is a validation, with a picture.
    """
    sizes = {"encoder": [4, 8], "decoder": [8], "final": [4]}
    network = {"class_path": "patchreg.networks.VoxelMorph", "init_args": sizes}
    stage = {"class_path": "patchreg.cascade.Stage", "init_args": {"spacing": "image", "network": network}}
    cascade = {"class_path": "patchreg.cascade.PatchCascade", "init_args": {"stages": [stage]}}
    config = {
        "seed_everything": 3,
        "model": {
            "class_path": "patchreg.training.RegistrationModule",
            "init_args": {
                "cascade": cascade,
                "objective": {
                    "similarity": {"class_path": "patchreg.losses.LNCC", "init_args": {"window": 5}},
                    "regularity": {"class_path": "patchreg.losses.Diffusion"},
                    "labels": [2, 3, 41, 42],
                    "overlap_weight": 1.0,
                },
                "optimization": {"warmup_steps": 2},
            },
        },
        "data": {
            "class_path": "patchreg.datasets.SynthesisDataModule",
            "init_args": {
                "phantoms": 6,
                "phantom_spacing_mm": 8.0,
                "pairs_per_epoch": pairs,
                "validation_pairs": 1,
                # no point on a voxel, where linear interpolation has two derivatives and rounding would choose
                "augmentation": {"rotation_deg": 10.0, "translation_mm": 3.0, "deformation_mm": 4.0},
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "strategy": strategy,
            "max_steps": 3,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(path.parent), "name": path.stem, "version": "run"},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"filename": "last", "enable_version_counter": False},
                },
                {"class_path": "patchreg.training.Pictures", "init_args": {"pairs": 1}},
            ],
        },
    }
    path.write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(path)]


def prediction(path: Path) -> list[str]:
    """A command that registers the test pair with what an experiment has trained."""
    checkpoint = path.parent / path.stem / "run" / "checkpoints" / "last.ckpt"
    options = ["--ckpt_path", str(checkpoint), "--trainer.logger.init_args.version", "predicted"]
    return ["predict", "--config", str(path), *options]


def grids_of(ranks: int) -> dict:
    return {"class_path": "patchreg.distributed.GridParallelStrategy", "init_args": {"grid_parallel_size": ranks}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What trainings in one, two, three and four processes left, that believe that SLURM has started them."""
    folder = tmp_path_factory.mktemp("fits")
    small, clipped = {"dtype": "float32"}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    one_checkpoint, three_checkpoint = str(folder / "one" / "last.ckpt"), str(folder / "three" / "last.ckpt")
    unused = {"use_spare": False, "options": {"find_unused_parameters": True}}
    launches = {
        "first": (1, [
            ["one", {"strategy": "auto"}], ["one32", {"strategy": "auto", **small}],
            ["one_clipped", {"strategy": "auto", **clipped}], ["one_unused", {"strategy": "auto", "use_spare": False}],
            ["one_on", {"strategy": "auto", "steps": 5, "resume": one_checkpoint}],
            experiment(folder / "cli_one.yaml", "ddp", 1), prediction(folder / "cli_one.yaml"),
        ]),
        "three": (3, [
            ["three", {}], ["three32", small], ["three_clipped", clipped],
            ["three_unused", unused], ["three_static", {"options": {"static_graph": True}}],
            ["three_on", {"steps": 5, "resume": one_checkpoint}],
            experiment(folder / "cli_three.yaml", "grid_parallel", 3), prediction(folder / "cli_three.yaml"),
            ["killed", {"die": [2, "kill"]}],
        ]),
        "back": (1, [["one_back", {"strategy": "auto", "steps": 5, "resume": three_checkpoint}]]),
        "two": (2, [
            ["ddp", {"strategy": "ddp"}], ["ddp_workers", {"strategy": "ddp", "workers": 1}],
            ["ddp_clipped", {"strategy": "ddp", **clipped}], experiment(folder / "cli_two.yaml", "ddp", 2, 8),
            ["first_lost", {"die": [0, "kill"]}],
        ]),
        "four": (4, [
            ["mesh", {"grid": 2}], ["mesh_workers", {"grid": 2, "workers": 1}], ["mesh_clipped", {"grid": 2, **clipped}],
            ["mesh_compressed", {"grid": 2, "options": {"compress": True}}],
            ["mesh_on", {"grid": 2, "steps": 4, "resume": three_checkpoint}],
            experiment(folder / "cli_four.yaml", grids_of(2), 4, 8),
            ["raised", {"grid": 2, "die": [3, "raise"]}],
        ]),
        "hung": (2, [["hung", {"die": [1, "hang"], "options": {"timeout": 3, **IMPATIENT}}]]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(FITS), str(folder), json.dumps(launches)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def found(folder: Path, name: str, rank: int = 0) -> dict:
    path = folder / f"{name}-{rank}.pt"
    if not path.exists():
        said = "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in folder.glob("*.txt"))
        pytest.fail(f"{name} did not end well\n{said}")
    return torch.load(path)


def worst(a: dict, b: dict) -> float:
    assert list(a) == list(b)
    return max(error(a[key], b[key]) for key in a)


def drawn(it: dict) -> list[str]:
    """What was drawn at random, but for the place in the data set: in one process Lightning shuffles otherwise."""
    return [name.split()[-1] for name in it["names"]]


def ended(folder: Path, launch: str) -> tuple[list[int], list[str]]:
    """Exit statuses, and what every rank said last."""
    statuses = json.loads((folder / "statuses.json").read_text())["statuses"][launch]
    return statuses, [(folder / f"{launch}-{rank}.txt").read_text() for rank in range(len(statuses))]


@pytest.mark.parametrize(
    ("name", "one", "dtype"),
    [
        ("three", "one", torch.float64),
        ("three32", "one32", torch.float32),
        ("three_clipped", "one_clipped", torch.float64),
        ("three_unused", "one_unused", torch.float64),
        ("three_static", "one", torch.float64),
        ("three_on", "one_on", torch.float64),
        ("one_back", "one_on", torch.float64),
    ],
)
def test_steps_are_those_of_one_process(folder, name, one, dtype):
    expected = found(folder, one)
    for rank in range(3 if name.startswith("three") else 1):
        it = found(folder, name, rank)
        assert drawn(it) == drawn(expected)
        assert it["losses"] == pytest.approx(expected["losses"], rel=limit(dtype))
        assert worst(it["weights"], expected["weights"]) < limit(dtype)
        if name.startswith("three"):
            assert {shape[1] for shape in it["shapes"]} <= {5, 6}  # of 16 planes


@pytest.mark.parametrize("kind", ["", "_workers", "_clipped"])
def test_two_grids_of_two_are_two_processes(folder, kind):
    """Other pairs in each, the same ones in a grid, and the same weights everywhere."""
    ranks = [found(folder, f"mesh{kind}", rank) for rank in range(4)]
    for rank, it in enumerate(ranks):
        plain = found(folder, f"ddp{kind}", rank // 2)
        assert it["names"] == plain["names"]
        assert it["losses"] == pytest.approx(plain["losses"], rel=limit(torch.float64))
        assert it["logged"] == pytest.approx(plain["logged"], rel=limit(torch.float64))
        assert worst(it["weights"], plain["weights"]) < limit(torch.float64)
        assert worst(it["weights"], ranks[0]["weights"]) == 0
    assert not set(ranks[0]["names"]) & set(ranks[2]["names"])


def test_a_hook_that_compresses_is_scaled(folder):
    it, exact = found(folder, "mesh_compressed"), found(folder, "ddp")
    assert 1e-6 < worst(it["weights"], exact["weights"]) < 1e-2


def test_checkpoints_are_those_of_data_parallelism(folder):
    kept = [torch.load(folder / name / "last.ckpt", weights_only=True) for name in ("mesh", "ddp", "three")]
    for checkpoint in kept:
        assert list(checkpoint) == list(kept[1])
        assert list(checkpoint["state_dict"]) == list(kept[1]["state_dict"])
        assert checkpoint["global_step"] == 3
    assert worst(kept[0]["state_dict"], kept[1]["state_dict"]) < limit(torch.float64)
    assert found(folder, "mesh_on")["losses"]  # a fourth step, on another mesh


def rows(folder: Path, name: str) -> list[dict[str, float]]:
    with (folder / name / "run" / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("name", "plain"), [("cli_three", "cli_one"), ("cli_four", "cli_two")])
def test_registration_from_the_command_line(folder, name, plain):
    """Losses, validation, gradients and the model in the end, by a YAML file that differs in its strategy alone."""
    for one, other in zip(rows(folder, name), rows(folder, plain), strict=True):
        compared = {key: value for key, value in other.items() if not key.startswith("memory")}
        assert {key: one[key] for key in compared} == pytest.approx(compared, rel=1e-4, abs=1e-7)
    paths = [folder / n / "run" for n in (name, plain)]
    kept = [torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in paths]
    moments = [k["optimizer_states"][0]["state"] for k in kept]
    mean, expected = (torch.cat([state["exp_avg"].flatten() for state in each.values()]) for each in moments)
    assert error(mean, expected) < limit(torch.float32)  # of gradients: Adam's weights do not tell how long they were
    assert worst(kept[0]["state_dict"], kept[1]["state_dict"]) < 1e-4
    assert (paths[0] / "model" / "model.safetensors").exists()


def test_validation_pictures_and_predictions(folder):
    logged = rows(folder, "cli_three")
    assert any("val/dice" in row for row in logged)
    pictures = [sorted(p.name for p in (folder / n / "run" / "pictures").iterdir()) for n in ("cli_three", "cli_one")]
    assert pictures[0] == pictures[1] == ["pair_0_step_000002.png"]
    found, expected = (list((folder / n / "predicted" / "predictions").iterdir()) for n in ("cli_three", "cli_one"))
    assert [path.name for path in found] == [path.name for path in expected] == ["0000.h5"]
    points = Grid.aligned((0, 0, 0), (9, 9, 9), 12.0)
    a, b = (read_transform(paths[0]).on(points).total_displacement_mm() for paths in (found, expected))
    assert float((a - b).abs().max()) < 1e-3


def test_a_killed_rank_ends_all(folder):
    statuses, said = ended(folder, "three")
    assert statuses == [1, 1, -9]
    saved = folder / "killed" / "last.ckpt"
    message = f"rank 2 of the grid group of ranks 0 to 2 was lost: its process ended, or its machine cannot be reached; the last checkpoint is {saved}: resume with --ckpt_path {saved}"
    assert all(message in text for text in said[:2])


def test_a_rank_that_raises_ends_all(folder):
    """Also those of other grids; it says itself what is wrong, the others say who was it."""
    statuses, said = ended(folder, "four")
    assert statuses == [1, 1, 1, 1]
    assert all("rank 3 of the grid group of ranks 2 to 3 raised InputError: this pair" in text for text in said[:3])
    assert said[3].strip().endswith("InputError: this pair cannot be used")


def test_the_first_rank_is_missed_too(folder):
    statuses, said = ended(folder, "two")
    assert statuses == [-9, 1]
    assert "rank 0 of the grid group of ranks 0 to 1 was lost" in said[1]


def test_a_rank_that_hangs_is_ended_and_says_where_it_was(folder):
    statuses, said = ended(folder, "hung")
    assert statuses == [1, 1]
    assert "got no answer from another rank within 3 s" in said[0]
    assert "signal.pause()" in said[1]
    assert "rank 1 was there" in said[1]
    assert json.loads((folder / "statuses.json").read_text())["seconds"]["hung"] < 120


def test_lightnings_launcher(folder):
    """It starts the second process; that one dies, and the first says so instead of being killed."""
    works = [["launched", {"devices": 2}], ["launched_killed", {"devices": 2, "die": [1, "kill"]}]]
    done = subprocess.run(
        [sys.executable, str(FITS), str(folder), json.dumps(works)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "RankLost: rank 1 of the grid group of ranks 0 to 1 was lost" in done.stderr
    expected = found(folder, "one")
    for rank in range(2):
        assert worst(found(folder, "launched", rank)["weights"], expected["weights"]) < limit(torch.float64)


def test_torchrun_and_the_command_line(folder):
    command = experiment(folder / "cli_torchrun.yaml", grids_of(2), 2)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "patchreg",
    ]
    done = subprocess.run(
        [*torchrun, *command], env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = rows(folder, "cli_torchrun"), rows(folder, "cli_one")
    assert [row["train/loss"] for row in a if "train/loss" in row] == pytest.approx(
        [row["train/loss"] for row in b if "train/loss" in row], rel=1e-4
    )


# In this process


def trainer(strategy, devices=4):
    import lightning as L

    return L.Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_checkpointing=False)


def test_by_name_all_ranks_share_a_volume():
    strategy = trainer("grid_parallel").strategy
    assert isinstance(strategy, GridParallelStrategy)
    assert (strategy.grid_parallel_size, strategy.data_parallel_size) == (4, 1)
    assert strategy.distributed_sampler_kwargs == {"num_replicas": 1, "rank": 0}
    assert strategy._timeout.total_seconds() == 600
    with pytest.raises(InputError, match="when the trainer starts"):
        _ = strategy.mesh


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="at least 1, or null for all processes, got 0"):
        GridParallelStrategy(0)
    with pytest.raises(InputError, match=r"size 3 does not divide the 4 processes \(4 devices on each of 1 nodes\)"):
        trainer(GridParallelStrategy(3))
    with pytest.raises(InputError, match="'spawn'"):
        GridParallelStrategy(2, start_method="spawn")
    with pytest.raises(InputError, match="averaging models"):
        GridParallelStrategy(2, model_averaging_period=4)


def shared_out(group, shapes, name):
    """The shape of a rank's part of a volume, or the error."""
    rank = torch.distributed.get_rank(group)
    shape = shapes[rank]
    volume = Volume(torch.zeros(1, *shape), Grid.aligned((0, 0, 0), shape, 1.0), name.format(rank=rank))
    try:
        (pair,) = share_out([Pair(volume, volume)], group)
        return tuple(pair.fixed.data.shape), pair.moving.grid.whole.shape
    except InputError as error:
        return str(error)


def test_batches_are_shared_out(pool):
    assert pool.run(2, shared_out, [(5, 7, 4)] * 2, "head") == [((1, 5, 4, 4), (5, 7, 4)), ((1, 5, 3, 4), (5, 7, 4))]
    others = pool.run(2, shared_out, [(5, 7, 4)] * 2, "head {rank}")
    assert all(
        "the ranks do not agree in the next batch: volume 0 is head 0 (1, 5, 7, 4) at" in text for text in others
    )
    thin = pool.run(3, shared_out, [(5, 5, 4)] * 3, "head")
    assert all("fewer than two planes for each of 3 ranks" in text for text in thin)


def test_volumes_are_found_wherever_they_are():
    grid = Grid.aligned((0, 0, 0), (4, 4, 4), 1.0)
    volume = Volume(torch.zeros(1, 4, 4, 4), grid, "a")
    pair = Pair(volume, volume, name="pair")
    batch = {"pairs": [pair], "more": (volume, 3), "text": "x"}
    out = replaced(batch, lambda v: replace(v, name="b"))
    assert (out["pairs"][0].fixed.name, out["more"][0].name, out["pairs"][0].name) == ("b", "b", "pair")
    assert out["pairs"][0].fixed_labels is None
    assert out["pairs"][0].moving_warp is pair.moving_warp
    assert batch["more"][0].name == "a"
    assert replaced(batch, lambda v: v)["pairs"][0] is pair


def test_importing_the_pieces_does_not_import_lightning(folder):
    assert json.loads((folder / "statuses.json").read_text())["lightning"] is False


class Ends:
    """Both ends of lifelines, in one process."""

    def __init__(self, ranks: int) -> None:
        self.heard: dict[int, list] = {rank: [] for rank in range(ranks)}
        first, port, token = Lifeline.host(self.heard[0].append)
        self.lines = [first]
        self.lines += [Lifeline.join("127.0.0.1", port, token, r, self.heard[r].append) for r in range(1, ranks)]
        self.port = port

    def wait(self, ranks, seconds=10.0):
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(self.heard[rank] for rank in ranks):
            time.sleep(0.01)
        return [self.heard[rank] for rank in ranks]


def test_lifelines_pass_on_the_first_bad_news():
    ends = Ends(3)
    ends.lines[2].tell("raised an error")
    heard = ends.wait([0, 1, 2])
    assert all([(news.rank, news.what) for news in each] == [(2, "raised an error")] for each in heard)
    ends.lines[1].tell("something else")
    assert ends.lines[0].wait(0.1).rank == 2
    for line in ends.lines:
        line.close()


def test_a_lifeline_that_is_closed_is_no_news_and_one_that_breaks_is():
    ends = Ends(4)
    ends.lines[1].close()
    time.sleep(0.3)
    assert not any(ends.heard.values())
    next(iter(ends.lines[2]._ranks)).shutdown(2)  # as the kernel does
    heard = ends.wait([0, 3])
    assert all(each[0].rank == 2 and each[0].what.startswith("was lost") for each in heard)
    for line in ends.lines:
        line.close()


def test_strangers_are_not_believed():
    import socket

    ends = Ends(2)
    with socket.create_connection(("127.0.0.1", ends.port)) as stranger:
        stranger.sendall(b'{"token": "guess", "rank": 1}\n{"rank": 1, "what": "was lost"}\n')
        assert stranger.recv(10) == b""
    with socket.create_connection(("127.0.0.1", ends.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    time.sleep(0.3)
    assert not any(ends.heard.values())
    assert Lifeline.join("127.0.0.1", 1, "", 1, print, timeout=1) is None
    for line in ends.lines:
        line.close()


def test_a_process_that_loads_data_does_not_keep_a_lifeline_open():
    ends = Ends(2)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.read(read, 1)
        os._exit(0)
    for connection in ends.lines[1]._ranks:
        connection.close()
    assert ends.wait([0])[0][0].rank == 1
    os.write(write, b".")
    os.waitpid(child, 0)
    ends.lines[0].close()


def test_what_counts_as_broken_communication():
    assert broken(torch.distributed.DistNetworkError("x"))
    assert broken(RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:49898"))
    assert not broken(RuntimeError("CUDA out of memory"))
    assert not broken(InputError("connection closed"))
    assert last_checkpoint(None) is None
