"""Peak memory of training TransMorph on whole volumes and inside the cascade, under every policy.

    python benchmarks/memory.py [--measure]

Batch 1, LNCC (window 9) and diffusion, AdamW with its state, the images included. The figures are those of
``patchreg memory``, for a GPU; nothing is computed. ``--measure`` also runs the first row and the cascade's for real on the
CPU, and counts live tensors: minutes, and 16 GB of host memory.
"""

from __future__ import annotations

import argparse
import gc
import time
from typing import Any

import torch
from common import table, write_results

from patchreg.cascade import PatchCascade, Prepared, PreparedPair, Stage
from patchreg.cascade.prepared import Normalization
from patchreg.losses import LNCC, Diffusion
from patchreg.memory import LivePeak
from patchreg.networks import TransMorph
from patchreg.spatial import Grid, Volume
from patchreg.training import Objective, RegistrationModule
from patchreg.training.estimate import Peak, Setting, inference_peak, training_peak
from patchreg.types import Activations, Shape3

BRAIN: Shape3 = (160, 192, 224)
LARGER: tuple[Shape3, ...] = ((256, 256, 256), (320, 320, 256))
WINDOW = {"whole": (5, 6, 7), "cascade": (6, 6, 6)}
GIB = 2**30


def build(kind: str, memory: Activations, reversible: bool, patch: int = 96) -> RegistrationModule:
    """The published network on the whole volume, or the same at two scales: the whole head, and patches at 1 mm."""
    torch.manual_seed(0)

    def network() -> TransMorph:
        return TransMorph("base", window=WINDOW[kind], memory=memory, reversible=reversible)

    if kind == "whole":
        stages = [Stage(network(), spacing="image")]
    else:
        stages = [Stage(network(), patch_shape=patch), Stage(network(), patch_shape=patch, spacing=1.0)]
    return RegistrationModule(PatchCascade(stages), Objective(LNCC(9), Diffusion()))


def setting(shape: Shape3, bf16: bool, gpu: bool = True) -> Setting:
    grid = Grid.aligned((0, 0, 0), shape, 1.0)
    return Setting(grid, precision=torch.bfloat16 if bf16 else None, gpu=gpu)


def measure(module: RegistrationModule, shape: Shape3) -> tuple[float, float]:
    """Live tensors of a real training step on the CPU, the optimiser's included, in GiB; and its seconds."""
    grid = Grid.aligned((0, 0, 0), shape, 1.0)
    optimizer = module.optimization.optimizer(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    gc.collect()
    with LivePeak() as memory:
        for tensor in module.parameters():
            memory.track(tensor)
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    memory.track(value)
        images = [Volume(torch.rand((1, *shape), generator=torch.Generator().manual_seed(n)), grid) for n in (1, 2)]
        pair = PreparedPair(*(Prepared(image, Normalization()) for image in images))
        start = time.perf_counter()
        total, _ = module.loss([pair])
        total.backward()
        optimizer.step()
        seconds = time.perf_counter() - start
    assert torch.isfinite(total), "the loss is not finite"
    return memory.peak / GIB, seconds


def row(name: str, shape: Shape3, policy: str, bf16: bool, peak: Peak, first: float | None) -> dict[str, Any]:
    total = peak.total / GIB
    return {
        "training": name,
        "image": "x".join(map(str, shape)),
        "memory": policy,
        "precision": "bf16" if bf16 else "float32",
        "peak GiB": round(total, 2),
        "of the first row": None if first is None else round(total / first, 3),
        **{f"{kind} GiB": round(size / GIB, 3) for kind, size in peak.kinds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run the first row and the cascade's for real")
    options = parser.parse_args()
    wanted: list[tuple[str, Shape3, Activations, bool, bool]] = []
    for kind in ("whole", "cascade"):
        for bf16 in (False, True):
            wanted += [(kind, BRAIN, memory, False, bf16) for memory in ("stored", "checkpoint")]
            wanted += [(kind, BRAIN, memory, True, bf16) for memory in ("stored", "checkpoint", "reversible")]
    for shape in LARGER:
        wanted += [("whole", shape, "stored", False, False), ("whole", shape, "checkpoint", False, False)]
        wanted += [("whole", shape, "reversible", True, False), ("cascade", shape, "checkpoint", False, False)]
    rows: list[dict[str, Any]] = []
    first: float | None = None
    for kind, shape, memory, reversible, bf16 in wanted:
        peak = training_peak(build(kind, memory, reversible), setting(shape, bf16))
        first = first or peak.total / GIB
        name = f"TransMorph{', reversible blocks' if reversible else ''}, {'whole volume' if kind == 'whole' else 'cascade, patches of 96^3'}"
        rows.append(row(name, shape, memory, bf16, peak, first))
        print(rows[-1], flush=True)
    for kind in ("whole", "cascade"):
        on_device, on_host = inference_peak(build(kind, "stored", False), setting(BRAIN, False))
        rows.append(row(f"registering, {kind}", BRAIN, "fields on the device", False, on_device, None))
        rows.append(row(f"registering, {kind}", BRAIN, "fields on the host", False, on_host, None))
    measured = []
    for kind, memory in (("whole", "stored"), ("cascade", "checkpoint")) if options.measure else ():
        estimate = training_peak(build(kind, memory, False), setting(BRAIN, False, gpu=False)).total / GIB
        real, seconds = measure(build(kind, memory, False), BRAIN)
        measured.append(
            {"training": kind, "memory": memory, "estimate for a CPU GiB": estimate, "measured GiB": real,
             "ratio": estimate / real, "seconds": seconds}
        )  # fmt: skip
        print(measured[-1], flush=True)
    columns = ["training", "image", "memory", "precision", "peak GiB", "of the first row"]
    print(table(rows, columns))
    if measured:
        print(table(measured, list(measured[0])))
    print(write_results("memory", rows, measured=measured))


if __name__ == "__main__":
    main()
