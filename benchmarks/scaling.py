"""Memory of every rank, and what it sends, in a training step whose volumes are split over 1, 2 and 4 ranks.

    python benchmarks/scaling.py

One stage on the whole volume (``spacing: image``), LNCC and diffusion, forward and backward pass, batch 1, float32. Strong
scaling splits one volume over more ranks; weak scaling gives every rank as many planes as one had. Processes run on the CPU
and talk by Gloo; what is counted are bytes, which are the same on GPUs: the tensors that live, without the weights. Times
are not reported: all ranks share one processor here.

Correctness first: the loss, and the norm of the gradients of all weights, added up over the ranks, must be those of one
process. The norm to 1e-3: in float32 TransMorph's gradients here are that far from those in float64, in one process and in
several. (Tests compare every gradient in float64.)
The last column is what ``patchreg memory --ranks N`` estimates without running anything.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import table, write_results

from patchreg.cascade import PatchCascade, Stage
from patchreg.datasets import Pair
from patchreg.distributed import counting
from patchreg.distributed.convert import convert_sharded
from patchreg.distributed.slab import Slab
from patchreg.distributed.strategy import networks_of
from patchreg.losses import LNCC, Diffusion
from patchreg.memory import LivePeak
from patchreg.networks import TransMorph, VoxelMorph
from patchreg.networks.swin import SwinSize
from patchreg.spatial import Grid, Volume
from patchreg.training import Objective, RegistrationModule
from patchreg.training.estimate import Setting, training_peak

MIB = 2**20

NETWORKS = {
    "VoxelMorph": VoxelMorph,
    "VoxelMorph, checkpoint": lambda: VoxelMorph(memory="checkpoint"),
    "TransMorph": lambda: TransMorph(SwinSize(24, (2, 2, 2), (2, 2, 4)), (4, 4, 4)),
    "TransMorph, checkpoint": lambda: TransMorph(SwinSize(24, (2, 2, 2), (2, 2, 4)), (4, 4, 4), memory="checkpoint"),
}
"""Under test; TransMorph with three levels of few channels, so that its weights do not hide its activations."""


def module_of(name: str) -> RegistrationModule:
    """The same weights in every process."""
    torch.manual_seed(0)
    stage = Stage(NETWORKS[name](), "displacement", spacing="image")
    with torch.no_grad():  # a displacement that is not zero
        for parameter in list(stage.network.parameters())[-2:]:
            parameter.add_(0.01 * torch.randn(parameter.shape))
    return RegistrationModule(PatchCascade([stage]), Objective(LNCC(), Diffusion()))


def image(grid: Grid, phase: float) -> Volume:
    """A smooth image given by a formula in the world, so that no rank has to make more than its part."""
    x = grid.affine[:3, 3].tolist()
    i, j, k = (torch.arange(n, dtype=torch.float32) + first for n, first in zip(grid.shape, x, strict=True))
    waves = torch.sin(0.31 * i + phase)[:, None, None] * torch.sin(0.23 * j)[:, None] * torch.cos(0.17 * k - phase)
    return Volume((1 + waves)[None], grid)


def step(name: str, whole: Grid, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """A training step on this rank's part of a pair."""
    module = module_of(name)
    grid = whole
    if group is not None and dist.get_world_size(group) > 1:
        for network in networks_of(module):
            convert_sharded(network)
        grid = Slab.of(whole, group)
        run(module, grid, name)  # networks look ahead
        module.zero_grad()
    gc.collect()
    with LivePeak() as memory, counting() as sent:
        loss = run(module, grid, name)
        peak = memory.peak
    parts = [p.grad.double() for p in module.parameters() if p.grad is not None and p.ndim > 1]
    if group is not None:
        for part in parts:
            dist.all_reduce(part, group=group)
    norm = float(torch.stack([part.square().sum() for part in parts]).sum().sqrt())
    return {"loss": loss, "gradient": norm, "peak": peak, "sent": sent}


def run(module: RegistrationModule, grid: Grid, name: str) -> float:
    """Images made, loss and gradients taken, with the same random numbers every time."""
    torch.manual_seed(1)
    pair = Pair(image(grid, 0.0), image(grid, 0.4), name=name)
    total, _ = module.loss([module.prepare(pair)])
    total.backward()
    return float(total.detach())


def measure(name: str, kind: str, shape: list[int], ranks: int, group: dist.ProcessGroup) -> dict[str, Any] | None:
    """A row of the table, on the first rank."""
    whole = Grid(shape, torch.eye(4))
    mine = step(name, whole, group)
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, mine, group=group)
    if dist.get_rank(group) > 0:
        return None
    if kind == "strong" or ranks == 1:
        alone = step(name, whole, None)
        for what, most in (("loss", 1e-5), ("gradient", 1e-3)):
            wrong = abs(mine[what] - alone[what]) / abs(alone[what])
            assert wrong < most, f"{name}: the {what} of {ranks} ranks is off by {wrong:.1e}"
    estimate = training_peak(module_of(name), Setting(whole, gpu=False, ranks=ranks)).kinds
    weights = sum(estimate.get(part, 0) for part in ("weights", "optimizer"))
    return {
        "network": name,
        "scaling": kind,
        "ranks": ranks,
        "volume": "x".join(map(str, shape)),
        "peak MiB a rank": round(max(each["peak"] for each in every) / MIB, 1),
        "sent MiB a rank": round(max(each["sent"].point_to_point for each in every) / MIB, 2),
        "messages a rank": max(each["sent"].messages for each in every),
        "reduced and gathered KiB a rank": round(mine["sent"].collective / 1024, 1),
        "estimated MiB": round((sum(estimate.values()) - weights) / MIB, 1),
    }


def work(rank: int, options: argparse.Namespace, store: str, answer: Any) -> None:
    """What every process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.ranks)
    sizes = [n for n in (1, 2, 4, 8) if n <= options.ranks]
    groups = {n: dist.new_group(list(range(n))) for n in sizes}
    rows = []
    for name in options.networks:
        for kind in ("strong", "weak"):
            for n in sizes:
                planes = options.planes if kind == "strong" else options.planes // options.ranks * n
                if rank < n:
                    rows.append(measure(name, kind, [planes, options.side, options.side], n, groups[n]))
                dist.barrier()
    if rank == 0:
        answer.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Beside the peak, what it is of one rank's: 1/N at best in strong scaling, 1 in weak."""
    for row in rows:
        one = next(r for r in rows if (r["network"], r["scaling"], r["ranks"]) == (row["network"], row["scaling"], 1))
        row["of one rank's"] = round(row["peak MiB a rank"] / one["peak MiB a rank"], 3)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=int, default=128)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args()
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answer = context.Queue()
        arguments = (options, str(Path(folder, "store")), answer)
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(options.ranks)]
        for process in processes:
            process.start()
        while answer.empty() and all(process.exitcode in (None, 0) for process in processes):
            time.sleep(1)
        if answer.empty():
            raise SystemExit("a process failed: see above")
        rows = with_ratios(answer.get())
        for process in processes:
            process.join()
    print(table(rows, list(rows[0])))
    print(write_results("scaling", rows, planes=options.planes, side=options.side))


if __name__ == "__main__":
    main()
