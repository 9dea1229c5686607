"""Peak live memory of a training step for images of 128, 256 and 512 voxels a side, at the same patches.

    python benchmarks/training_memory.py

Everything is real: images, sampling, networks, losses and the backward pass. What is counted are the bytes of all
tensors that live at one time on the CPU. Correctness first: every loss must be finite and every weight get a gradient.
"""

from __future__ import annotations

import argparse
import gc
import time

import torch
import yaml
from common import table, write_results

from patchreg.cascade import Prepared, PreparedPair
from patchreg.cascade.prepared import Normalization
from patchreg.cascade.storage import build_cascade
from patchreg.losses import LNCC, Diffusion
from patchreg.memory import LivePeak
from patchreg.ops.windows import gaussian_smooth
from patchreg.resources import resource_folder
from patchreg.spatial import Grid, Volume
from patchreg.training import Objective, RegistrationModule

HEAD_MM = 192.0


def made_image(size: int, seed: int) -> Volume:
    """A smooth random image over a cube of 192 mm, at any resolution."""
    generator = torch.Generator().manual_seed(seed)
    coarse = gaussian_smooth(torch.randn((1, 1, 32, 32, 32), generator=generator), (2.0,) * 3)
    data = torch.nn.functional.interpolate(coarse, size=(size,) * 3, mode="trilinear", align_corners=False)[0]
    return Volume(data.sub_(data.min()), Grid.aligned((0, 0, 0), (size,) * 3, HEAD_MM / size), f"made {size}")


def measure(size: int, cascade_config: dict, patches: int) -> dict:
    """One training step on images of ``size`` voxels a side."""
    torch.manual_seed(0)
    module = RegistrationModule(build_cascade(cascade_config), Objective(LNCC(9), Diffusion()))
    gc.collect()
    with LivePeak() as memory:
        images = [made_image(size, seed) for seed in (0, 1)]
        gc.collect()
        images_mib = memory.live / 2**20
        memory.peak = memory.live
        start = time.perf_counter()
        pair = PreparedPair(*(Prepared(image, Normalization()) for image in images))
        loss, _ = module.loss([pair])
        loss.backward()
        seconds = time.perf_counter() - start
        peak_mib = memory.peak / 2**20
    assert torch.isfinite(loss), "the loss is not finite"
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad), "a weight got no gradient"
    return {
        "image": f"{size}^3",
        "voxel mm": HEAD_MM / size,
        "two images MiB": round(images_mib, 1),
        "peak MiB": round(peak_mib, 1),
        "peak - images MiB": round(peak_mib - images_mib, 1),
        "seconds": round(seconds, 2),
        "patches": patches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--patch", type=int, default=64)
    options = parser.parse_args()
    config = yaml.safe_load((resource_folder("models") / "any_contrast" / "config.yaml").read_text())
    for stage in config["cascade"]["init_args"]["stages"]:
        arguments = stage["init_args"]
        if arguments.get("predicts") != "affine":
            arguments["patch_shape"] = options.patch
        if not isinstance(arguments.get("spacing", "whole"), str):
            arguments["spacing"] = 3.0 if arguments.get("patches", 1) > 1 else 1.5
    rows = [measure(size, config, options.patch) for size in options.sizes]
    print(table(rows, list(rows[0])))
    print(write_results("training_memory", rows, patch=options.patch))


if __name__ == "__main__":
    main()
