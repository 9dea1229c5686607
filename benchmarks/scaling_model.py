"""What one rank of many would hold and send, for volumes that no machine here can hold.

    python benchmarks/scaling_model.py

The code of a training step, and of instance optimisation, runs on tensors that have shapes and no numbers, as one rank of a
group whose other ranks are pretended: memory is what would live at one time, traffic what would be sent. Beside the traffic
stands the formula of docs/grid_parallel.md. The volume is the human brain at 100 micrometres of FFDP (arXiv:2509.25044).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import table, write_results

from patchreg.cascade import PatchCascade, Prepared, Stage
from patchreg.cascade.prepared import Normalization
from patchreg.distributed import counting
from patchreg.distributed.communication import Pretended
from patchreg.distributed.slab import Slab
from patchreg.fake import Fakes
from patchreg.inference.refine import Refinement, refine_deformable
from patchreg.losses import LNCC, Diffusion
from patchreg.memory import LivePeak
from patchreg.networks import VoxelMorph
from patchreg.spatial import Affine, Grid, Volume
from patchreg.training import Objective, RegistrationModule
from patchreg.training.estimate import Setting, training_peak

GIB = 2**30

NETWORKS = {
    "VoxelMorph": VoxelMorph,
    "VoxelMorph, half-resolution flow, checkpoint": lambda: VoxelMorph(
        decoder=(32, 32, 32), final=(32, 16), memory="checkpoint"
    ),
}


def by_formula(shape: list[int], reach: int = 4, number: int = 4) -> float:
    """Bytes that a rank with neighbours on both sides sends in a step of the paper's VoxelMorph; see docs/grid_parallel.md."""
    levels, decoder, final = (16, 32, 32, 32, 32), (32, 32, 32, 32), (32, 16, 16)
    plane = number * (shape[1] + -shape[1] % 16) * (shape[2] + -shape[2] % 16)

    def sent(channels: int, level: int, planes: int) -> float:
        return channels * planes * plane / 4**level

    total = sent(2, 0, 2)  # the images, which have no gradient
    for level, channels in enumerate(levels[:-1]):
        total += sent(channels, level, 3)  # stride 2: one plane, fetched again for the backward pass, and its gradient
    width = levels[-1]
    for level, out in zip(range(len(levels) - 2, -1, -1), decoder, strict=True):
        total += sent(width, level + 1, 4) + sent(levels[level], level, 4)  # what is upsampled, and the skip
        width = out
    for out in (*final, 3):
        total += sent(width, 0, 4)
        width = out
    # LNCC: half a window of two images and of a gradient; diffusion; the moving image where displacements reach
    return total + shape[1] * shape[2] * number * (2 * 4 * 3 + 3 * 2 + 2 * reach)


def row(name: str, shape: list[int], ranks: int, precision: torch.dtype | None) -> dict[str, Any]:
    """One network on one volume over so many ranks."""
    module = RegistrationModule(
        PatchCascade([Stage(NETWORKS[name](), "displacement", spacing="image")]), Objective(LNCC(), Diffusion())
    )
    setting = Setting(Grid(shape, torch.eye(4)), precision=precision, ranks=ranks)
    peak = training_peak(module, setting)
    return {
        "network": name,
        "volume": "x".join(map(str, shape)),
        "precision": "bf16-mixed" if precision else "32",
        "ranks": ranks,
        "peak GiB a rank": round(peak.total / GIB, 2),
        "sent GiB a rank": round(peak.sent.point_to_point / GIB, 3),
        "by formula GiB": round(by_formula(shape) / GIB, 3) if name == "VoxelMorph" and not precision else None,
        "messages a rank": peak.sent.messages,
    }


def optimisation(shape: list[int], ranks: int) -> dict[str, Any]:
    """A pair optimised at its own resolution, as FFDP does; per iteration."""
    fakes, iterations = Fakes(), 2
    grid = Slab.of(Grid(shape, torch.eye(4)), Pretended(1, ranks))
    settings = Refinement(window=5, spacings_mm=(1.0,), iterations=(iterations,), margin_mm=0.0)
    with fakes, LivePeak() as memory, counting() as sent:
        pair = [Prepared(Volume(fakes.empty((1, *grid.shape)), grid), Normalization()) for _ in range(2)]
        refine_deformable(*pair, Affine.identity(), settings, torch.device("cpu"))
    return {
        "network": "none: LNCC and diffusion by Adam on this pair",
        "volume": "x".join(map(str, shape)),
        "precision": "32",
        "ranks": ranks,
        "peak GiB a rank": round(memory.peak / GIB, 2),
        "sent GiB a rank": round(sent.point_to_point / iterations / GIB, 3),
        "by formula GiB": None,
        "messages a rank": sent.messages // iterations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[1760, 1760, 1278])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args()
    rows = [
        row(name, options.shape, ranks, precision)
        for name in options.networks
        for precision in (None, torch.bfloat16)
        for ranks in options.ranks
    ]
    rows += [optimisation(options.shape, ranks) for ranks in options.ranks]
    print(table(rows, list(rows[0])))
    print(write_results("scaling_model", rows))


if __name__ == "__main__":
    main()
