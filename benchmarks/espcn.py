"""Peak memory and time of a training step of ESPCN, of ESPCN-RN4, and of ESPCN-RN4 trained naively.

    python benchmarks/espcn.py [--batch 32] [--repeats 5]

The three rows of figure 6 of Blumberg et al. 2018 (arXiv:1808.05577), in its sizes: patches of 6 x 11^3 to 6 x 14^3. What
is counted are the bytes of all tensors that live at one time on the CPU: weights, their gradients, activations, and what
the optimiser holds. The paper counts what a GPU had allocated, so ratios are what compares. Correctness first: in float64
both ways to train ESPCN-RN4 must give the same predictions and gradients.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
import torch.nn.functional as F
from common import table, write_results
from torch import nn

from patchreg.memory import LivePeak
from patchreg.networks import ESPCN

ROWS = {
    "ESPCN": ({}, 523),
    "ESPCN-RN4, reversible": ({"blocks": 4, "memory": "reversible"}, 541),
    "ESPCN-RN4, checkpoint": ({"blocks": 4, "memory": "checkpoint"}, None),
    "ESPCN-RN4, stored": ({"blocks": 4, "memory": "stored"}, 1091),
}


def made(options: dict) -> ESPCN:
    """A network whose blocks are no longer the identity."""
    torch.manual_seed(0)
    network = ESPCN(**options)
    for name, p in network.named_parameters():
        if "elongation" in name:
            nn.init.normal_(p, std=0.02)
    return network


def patches(batch: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    low, high = (torch.randn((batch, 6, n, n, n), generator=generator, dtype=dtype) for n in (11, 14))
    return low, high


def gradients(options: dict) -> list[torch.Tensor]:
    network = made(options).double()
    low, high = patches(2, torch.float64)
    out = network(low)
    F.mse_loss(out, high).backward()
    return [out.detach(), *(p.grad for p in network.parameters())]


def check() -> float:
    """The largest relative difference of predictions and gradients between the ways to train ESPCN-RN4."""
    expected = gradients(ROWS["ESPCN-RN4, stored"][0])
    worst = 0.0
    for row in ("ESPCN-RN4, reversible", "ESPCN-RN4, checkpoint"):
        for a, b in zip(gradients(ROWS[row][0]), expected, strict=True):
            worst = max(worst, float((a - b).norm() / b.norm()))
    assert worst < 1e-10, f"predictions or gradients differ by {worst}"
    return worst


def step(network: nn.Module, optimizer: torch.optim.Optimizer, low: torch.Tensor, high: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    F.mse_loss(network(low), high).backward()
    optimizer.step()


def peak(options: dict, batch: int) -> dict:
    """Of the second step, in which the optimiser holds all that it will."""
    gc.collect()
    with LivePeak() as memory:
        network = made(options)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-4)
        low, high = patches(batch)
        step(network, optimizer, low, high)
        memory.peak = memory.live
        step(network, optimizer, low, high)
    weights = sum(p.nbytes for p in network.parameters())
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "peak MB": round(memory.peak / 1e6, 1),
        "weights, gradients, optimiser MB": round(4 * weights / 1e6, 1),
    }


def times(batch: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of steps; the networks take turns."""
    networks = {name: made(options) for name, (options, _) in ROWS.items()}
    optimizers = {name: torch.optim.AdamW(network.parameters(), 1e-4) for name, network in networks.items()}
    low, high = patches(batch)
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    for repeat in range(repeats + 1):
        for name, network in networks.items():
            start = time.perf_counter()
            step(network, optimizers[name], low, high)
            if repeat:  # the first is for warming up
                found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    difference = check()
    seconds = times(options.batch, options.repeats)
    naive = seconds["ESPCN-RN4, stored"]
    rows: list[dict] = []
    for name, (settings, paper) in ROWS.items():
        ratios = [a / b for a, b in zip(seconds[name], naive, strict=True)]
        row = {"network": name, **peak(settings, options.batch), "paper MB": paper}
        first = rows[0] if rows else row
        rows.append(
            row
            | {
                "ratio": round(row["peak MB"] / first["peak MB"], 2),
                "paper ratio": None if paper is None else round(paper / first["paper MB"], 2),
                "seconds": round(statistics.median(seconds[name]), 3),
                "time / stored": round(statistics.median(ratios), 2),
                "spread": [round(min(ratios), 2), round(max(ratios), 2)],
            }
        )
    print(table(rows, list(rows[0])))
    print(write_results("espcn", rows, batch=options.batch, repeats=options.repeats, difference_float64=difference))


if __name__ == "__main__":
    main()
