"""Memory of every rank, and what it sends, when one volume is split over 1, 2 and 4 of them.

    python benchmarks/scaling_operations.py

One step of registration without its network: the moving image is warped by a displacement, LNCC with the fixed image and the
diffusion of the displacement are the loss, and the backward pass ends at the displacement. Strong scaling splits one volume
over more ranks; weak scaling gives every rank as many planes as one had. The processes run on the CPU and talk by Gloo;
what is counted are bytes, which are the same on GPUs. Times are not reported: all ranks share one processor here.

Correctness first: the loss, and the norm of the gradient, must be those of plain operations on whole volumes.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import table, write_results

from patchreg import distributed, ops
from patchreg.distributed import Partition, counting
from patchreg.losses import Diffusion
from patchreg.memory import LivePeak

SPACING = (1.0, 1.0, 1.0)


def made_slab(partition: Partition, rank: int, side: int, channels: int, phase: float) -> torch.Tensor:
    """A smooth volume given by a formula, so that no rank has to make more than its slab."""
    start, stop = partition.bounds(rank)
    i, j, k = (torch.arange(a, b, dtype=torch.float32) for a, b in ((start, stop), (0, side), (0, side)))
    waves = [
        torch.sin(0.11 * (c + 1) * i + phase)[:, None, None]
        * torch.sin(0.13 * j + c)[:, None]
        * torch.cos(0.07 * k - phase)
        for c in range(channels)
    ]
    return torch.stack(waves)[None]


def step(partition: Partition, side: int, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """One step on this rank's slabs, or, without a group, on whole volumes by plain operations."""
    rank = 0 if group is None else dist.get_rank(group)
    gc.collect()
    with LivePeak() as memory:
        fixed, moving = (made_slab(partition, rank, side, 1, phase) for phase in (0.0, 0.4))
        u = made_slab(partition, rank, side, 3, 0.2).mul_(3).requires_grad_()
        gc.collect()
        inputs, memory.peak = memory.live, memory.live
        with counting() as sent:
            if group is None:
                loss = 1 - ops.lncc(fixed, ops.warp(moving, u)) + Diffusion()(u, SPACING)
            else:
                moved = distributed.warp(moving, partition, u, group=group)
                similarity = distributed.lncc(fixed, moved, partition, group=group)
                loss = 1 - similarity + distributed.diffusion(u, partition, SPACING, group)
            loss.backward()
        peak = memory.peak
    assert u.grad is not None
    square = u.grad.double().square().sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    return {
        "loss": float(loss.detach()),
        "gradient": float(square.sqrt()),
        "inputs": inputs,
        "peak": peak,
        "sent": sent,
    }


def measure(kind: str, planes: int, side: int, ranks: int, group: dist.ProcessGroup) -> dict[str, Any] | None:
    """A row of the table, on the first rank."""
    partition = Partition.even(planes, ranks)
    mine = step(partition, side, group)
    every: list[Any] = [None] * ranks
    dist.all_gather_object(every, mine, group=group)
    if dist.get_rank(group) > 0:
        return None
    whole = step(Partition((planes,)), side, None)
    for name in ("loss", "gradient"):
        wrong = abs(mine[name] - whole[name]) / abs(whole[name])
        assert wrong < 1e-5, f"the {name} of {ranks} ranks is off by {wrong:.1e}"
    mib = 2**20
    return {
        "scaling": kind,
        "ranks": ranks,
        "volume": f"{planes}x{side}x{side}",
        "inputs MiB a rank": round(max(each["inputs"] for each in every) / mib, 1),
        "peak MiB a rank": round(max(each["peak"] for each in every) / mib, 1),
        "peak MiB in one process, plain": round(whole["peak"] / mib, 1),
        "sent MiB a rank": round(max(each["sent"].point_to_point for each in every) / mib, 2),
        "messages a rank": max(each["sent"].messages for each in every),
        "reduced and gathered bytes a rank": mine["sent"].collective,
    }


def work(rank: int, ranks: int, store: str, planes: int, side: int, answer: Any) -> None:
    """What every process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    sizes = [n for n in (1, 2, 4, 8) if n <= ranks]
    groups = {n: dist.new_group(list(range(n))) for n in sizes}
    rows = []
    for kind, n in [("strong", n) for n in sizes] + [("weak", n) for n in sizes]:
        if rank < n:
            total = planes if kind == "strong" else planes // ranks * n
            rows.append(measure(kind, total, side, n, groups[n]))
        dist.barrier()
    if rank == 0:
        answer.put(rows)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planes", type=int, default=256)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=4)
    options = parser.parse_args()
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        answer = context.Queue()
        arguments = (options.ranks, str(Path(folder, "store")), options.planes, options.side, answer)
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(options.ranks)]
        for process in processes:
            process.start()
        rows = answer.get(timeout=1800)
        for process in processes:
            process.join()
    print(table(rows, list(rows[0])))
    print(write_results("scaling_operations", rows, planes=options.planes, side=options.side))


if __name__ == "__main__":
    main()
