# ruff: noqa: E402  what is imported first is what is tested first
"""Trainings that tests start in several processes: ``python fits.py FOLDER REQUEST``, see the end of the file.

Every rank of a fit writes what it found to ``FOLDER/NAME-RANK.pt``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import patchreg.distributed  # noqa: F401

LIGHTNING_CAME_ALONG = "lightning" in sys.modules

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.data import DataLoader, Dataset

from patchreg.cli.main import main
from patchreg.datasets import Pair
from patchreg.datasets.files import generator_for
from patchreg.distributed import GridParallelStrategy, failures
from patchreg.errors import InputError
from patchreg.losses import MSE
from patchreg.spatial import Grid, Volume

SHAPE = (16, 7, 6)
BATCHES = 6


class DrawnPairs(Dataset):
    """Pairs of noise, drawn as training pairs are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __len__(self) -> int:
        return 4 * BATCHES

    def __getitem__(self, index: int) -> Pair:
        generator = generator_for(None)
        name = f"{index} drawn {int(torch.randint(2**40, (1,), generator=generator))}"
        images = [torch.rand((1, *SHAPE), generator=generator, dtype=torch.float64).to(self.dtype) for _ in range(2)]
        grid = Grid.aligned((0, 0, 0), SHAPE, 2.0)
        return Pair(*(Volume(image, grid, name) for image in images))


class SmallNetwork(nn.Module):
    """Two convolutions, one of them left out at random, and a layer that is used where it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.spare = (
            nn.Conv3d(2, 4, 3, padding=1),
            nn.Conv3d(4, 4, 3, padding=1),
            nn.Conv3d(4, 4, 1),
        )
        self.last = nn.Conv3d(4, 1, 3, padding=1)
        self.use_spare = True

    def forward(self, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        x = self.first(torch.cat([fixed, moving], dim=1)).tanh()
        kept = torch.rand((x.shape[0], 1, 1, 1, 1)).to(x) if self.training else 1.0
        x = x + kept * self.second(x).tanh()
        return self.last(self.spare(x) if self.use_spare else x)


class SmallModule(L.LightningModule):
    """Learns the fixed image.

    Args:
        use_spare: whether all parameters are used.
        die: the rank that fails in the second step, and how: "raise", "kill", "hang".
    """

    def __init__(self, use_spare: bool = True, die: tuple[int, str] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.die = SmallNetwork(), die
        self.network.use_spare = use_spare
        self.losses: list[float] = []
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def training_step(self, batch: list[Pair], batch_idx: int) -> torch.Tensor:
        (pair,) = batch
        grid = pair.fixed.grid
        self.names.append(pair.name or pair.fixed.name)
        self.shapes.append(tuple(pair.fixed.data.shape))
        if self.die is not None and batch_idx == 1 and self.global_rank == self.die[0]:
            self.fail(self.die[1])
        with grid.scope():
            found = self.network(pair.fixed.batch, pair.moving.batch)
        loss = grid.measure(MSE(), pair.fixed.batch, found)
        self.losses.append(float(loss.detach()))
        self.log("loss", loss, sync_dist=True, batch_size=1)
        self.log("pairs", 1.0, sync_dist=True, reduce_fx="sum", on_step=False, on_epoch=True, batch_size=1)
        return loss

    def fail(self, how: str) -> None:
        if how == "raise":
            raise InputError("this pair cannot be used")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)  # unlike Adam it sees how long a gradient is


def fit(
    folder: Path,
    name: str,
    strategy: str | None = None,
    grid: int | None = None,
    steps: int = 3,
    dtype: str = "float64",
    workers: int = 0,
    resume: str | None = None,
    use_spare: bool = True,
    die: tuple[int, str] | None = None,
    options: dict[str, Any] | None = None,
    devices: int | None = None,
    **trainer: Any,
) -> None:
    """Fit, in however many processes there are, and write what was found.

    Args:
        folder: for files.
        name: of this fit.
        strategy: by name. None: grid parallel.
        grid: ranks of a grid.
        steps: of the optimiser.
        dtype: of all.
        workers: processes that load data.
        resume: a checkpoint.
        use_spare: see :class:`SmallModule`.
        die: likewise.
        options: of the strategy.
        devices: processes. None: as many as were started.
        trainer: more of its options.
    """
    options = dict(options or {})
    if "timeout" in options:
        options["timeout"] = timedelta(seconds=options["timeout"])
    failures.GRACE, failures.PATIENCE = options.pop("grace", failures.GRACE), options.pop("patience", failures.PATIENCE)
    if options.pop("compress", False):
        options["ddp_comm_hook"] = fp16_compress_hook
    L.seed_everything(5, workers=True, verbose=False)
    module = SmallModule(use_spare, die).to(getattr(torch, dtype))
    saved = ModelCheckpoint(folder / name, filename="last", every_n_train_steps=1, enable_version_counter=False)
    made = L.Trainer(
        accelerator="cpu", devices=devices or int(os.environ.get("SLURM_NTASKS") or os.environ.get("WORLD_SIZE") or 1),
        strategy=strategy or GridParallelStrategy(grid, **options), max_steps=steps, max_epochs=-1,
        limit_train_batches=BATCHES, logger=False, callbacks=[saved], enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **trainer,
    )  # fmt: skip
    L.seed_everything(5, workers=True, verbose=False)  # as data parallelism does, too
    loader = DataLoader(DrawnPairs(getattr(torch, dtype)), num_workers=workers, collate_fn=list)
    made.fit(module, loader, ckpt_path=resume)
    found = {
        "weights": {key: value.clone() for key, value in module.state_dict().items()},
        "losses": module.losses,
        "names": module.names,
        "shapes": module.shapes,
        "logged": {key: float(value) for key, value in made.callback_metrics.items()},
    }
    torch.save(found, folder / f"{name}-{made.global_rank}.pt")


def run(folder: Path, works: list[Any]) -> None:
    """Do one thing after the other: a fit [name, options], or what the command line is given [argument, ...]."""
    torch.set_num_threads(1)
    for name, *rest in works:
        if rest and isinstance(rest[0], dict):
            fit(folder, name, **rest[0])
        elif status := main([name, *rest]):
            sys.exit(status)


def as_slurm(folder: Path, name: str, ranks: int, works: list[Any]) -> list[int]:
    """Run in processes that believe that SLURM started them; their exit statuses. Output goes to ``NAME-RANK.txt``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        if (child := os.fork()) == 0:
            with (folder / f"{name}-{rank}.txt").open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ |= {
                "SLURM_NTASKS": str(ranks), "SLURM_NTASKS_PER_NODE": str(ranks), "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            status = 1
            try:
                run(folder, works)
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    folder, request = Path(sys.argv[1]), json.loads(sys.argv[2])
    if isinstance(request, dict):  # launches by name: how many ranks, and what they do
        seconds = {}
        statuses = {}
        for name, (ranks, works) in request.items():
            began = time.monotonic()
            statuses[name] = as_slurm(folder, name, ranks, works)
            seconds[name] = time.monotonic() - began
        said = {"statuses": statuses, "seconds": seconds, "lightning": LIGHTNING_CAME_ALONG}
        (folder / "statuses.json").write_text(json.dumps(said))
    else:
        run(folder, request)
