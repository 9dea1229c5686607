"""Memory and time of a training step of reversible stacks of 1 to 16 blocks, under the three policies.

    python benchmarks/depth.py [--channels 16] [--side 64] [--repeats 5]

A stack of reversible blocks on one patch, between two convolutions, with a loss on every voxel. Memory is the peak of all
tensors that live at one time on the CPU, less the weights and their gradients, which grow with depth under every policy.
Time is the median of steps in which the policies take turns. Correctness first: the gradients of every policy must be
those of the stored one.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from common import table, write_results
from torch import nn

from patchreg.memory import LivePeak
from patchreg.networks import ReversibleConvBlock, ReversibleSequence

POLICIES = ("stored", "checkpoint", "reversible")


def made(depth: int, channels: int, memory: str) -> nn.Sequential:
    """Two convolutions and a stack between them whose blocks are no longer the identity."""
    torch.manual_seed(depth)
    stack = ReversibleSequence([ReversibleConvBlock(channels // 2) for _ in range(depth)], memory)
    for name, p in stack.named_parameters():
        if "conv" in name:
            nn.init.normal_(p, std=0.02)
    return nn.Sequential(nn.Conv3d(2, channels, 3, padding=1), stack, nn.Conv3d(channels, 3, 3, padding=1))


def step(network: nn.Module, x: torch.Tensor) -> None:
    network.zero_grad(set_to_none=True)
    network(x).square().mean().backward()


def check(networks: dict[str, nn.Module], x: torch.Tensor) -> float:
    """The largest relative difference of all gradients together from those of the stored policy."""
    found = {}
    for memory, network in networks.items():
        step(network, x)
        found[memory] = torch.cat([p.grad.flatten() for p in network.parameters()])
    expected = found["stored"]
    worst = max(float((g - expected).norm() / expected.norm()) for g in found.values())
    assert worst < 1e-4, f"gradients differ by {worst}"
    return worst


def peak_mib(network: nn.Module, x: torch.Tensor) -> float:
    """Beyond the input, the weights and their gradients."""
    network.zero_grad(set_to_none=True)
    gc.collect()
    with LivePeak() as memory:
        memory.track(x)
        for p in network.parameters():
            memory.track(p)
        start = memory.live
        step(network, x)
        return (memory.peak - start - sum(p.nbytes for p in network.parameters())) / 2**20


def measure(depth: int, channels: int, side: int, repeats: int) -> list[dict]:
    x = torch.randn((1, 2, side, side, side), generator=torch.Generator().manual_seed(0))
    networks = {memory: made(depth, channels, memory) for memory in POLICIES}
    difference = check(networks, x)
    seconds: dict[str, list[float]] = {memory: [] for memory in POLICIES}
    for _ in range(repeats):
        for memory, network in networks.items():
            start = time.perf_counter()
            step(network, x)
            seconds[memory].append(time.perf_counter() - start)
    ratios = {m: [a / b for a, b in zip(seconds[m], seconds["stored"], strict=True)] for m in POLICIES}
    return [
        {
            "blocks": depth,
            "memory": memory,
            "peak MiB": round(peak_mib(network, x), 2),
            "weights MiB": round(sum(p.nbytes for p in network.parameters()) / 2**20, 2),
            "seconds": round(statistics.median(seconds[memory]), 3),
            "time / stored": round(statistics.median(ratios[memory]), 2),
            "spread": [round(min(ratios[memory]), 2), round(max(ratios[memory]), 2)],
            "gradient difference": difference,
        }
        for memory, network in networks.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rows: list[dict] = []
    for depth in (1, 2, 4, 8, 16):
        rows += measure(depth, options.channels, options.side, options.repeats)
    before: dict[str, float] = {}
    for row in rows:
        known = before.get(row["memory"])
        row["growth %"] = None if known is None else round(100 * (row["peak MiB"] / known - 1), 2)
        before[row["memory"]] = row["peak MiB"]
    print(table(rows, list(rows[0])))
    print(write_results("depth", rows, **vars(options)))


if __name__ == "__main__":
    main()
