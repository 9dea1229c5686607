"""Peak memory of a training step of VoxelMorph on a whole volume, under every policy, without computing anything.

    python benchmarks/voxelmorph_memory.py [--shape 160 192 224]

The network, a loss on every voxel and the backward pass run on tensors that have a shape and no numbers; what is counted
are the bytes of all tensors that live at one time, the images, weights and gradients included. Beside it stands what is
kept between the two passes. Correctness first: on a small pair, in float64, every policy must give the gradients of the
stored one.
"""

from __future__ import annotations

import argparse

import torch
from common import table, write_results
from torch import nn

from patchreg.fake import Fakes
from patchreg.memory import LivePeak
from patchreg.networks import VoxelMorph

CASES = [
    (norm, reversible, memory)
    for norm in (False, True)
    for reversible in (0, 2, 8)
    for memory in ("stored", "checkpoint", "reversible")
    if (reversible or memory != "reversible") and not (norm and reversible == 8)
]


def gradients(norm: bool, reversible: int, memory: str) -> torch.Tensor:
    torch.manual_seed(0)
    network = VoxelMorph((4, 8, 8), (8, 8), (8, 4), norm=norm, reversible=reversible, memory=memory)
    for name, p in network.named_parameters():
        if "stacks" in name or "flow" in name:
            nn.init.normal_(p, std=0.1)
    images = torch.rand((2, 1, 1, 48, 8, 12), generator=torch.Generator().manual_seed(1)).double()
    network.double()(*images).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def check() -> float:
    """The largest relative difference from the gradients of the stored policy."""
    worst = 0.0
    for norm, reversible, memory in CASES:
        expected = gradients(norm, reversible, "stored")
        worst = max(worst, float((gradients(norm, reversible, memory) - expected).norm() / expected.norm()))
    assert worst < 1e-10, f"gradients differ by {worst}"
    return worst


def measure(shape: list[int], autocast: bool, **options: object) -> tuple[int, int]:
    """MiB at the peak, and kept between the passes."""
    fakes, network = Fakes(), VoxelMorph(**options)
    fakes.convert(network)
    images = [fakes.empty((1, 1, *shape)) for _ in range(2)]
    with fakes, LivePeak() as memory:
        for tensor in (*images, *network.parameters()):
            memory.track(tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = network(*images)
        kept = memory.live
        out.square().mean().backward()
    return round(memory.peak / 2**20), round(kept / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[160, 192, 224])
    options = parser.parse_args()
    difference = check()
    rows = []
    for norm, reversible, memory in CASES:
        row: dict[str, object] = {"norm": norm, "reversible": reversible, "memory": memory}
        for name, autocast in (("float32", False), ("bf16", True)):
            peak, kept = measure(options.shape, autocast, norm=norm, reversible=reversible, memory=memory)
            row |= {f"{name} peak MiB": peak, f"{name} kept MiB": kept}
        rows.append(row)
    print(table(rows, list(rows[0])))
    print(write_results("voxelmorph_memory", rows, shape=options.shape, difference_float64=difference))


if __name__ == "__main__":
    main()
