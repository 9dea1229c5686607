"""Real scans onto a template: correlation inside the template's head before, after affine, after everything.

    python benchmarks/scans.py --fixed TEMPLATE --moving SCAN [SCAN ...] --out FOLDER

Normalised correlation of intensities within the fixed image's content, and squared local correlation (LNCC, window 9)
there. The reports are written for looking at: a number is no registration.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import table, write_results

import patchreg
from patchreg import ops
from patchreg.inference.registration import resample
from patchreg.spatial import Affine, Transform, Volume
from patchreg.spatial.foreground import content_threshold


def correlations(fixed: Volume, moving: Volume, transform: Transform) -> tuple[float, float]:
    """Pearson correlation, and mean LNCC, over the fixed image's content."""
    moved = resample(moving, transform, fixed.grid)
    inside = fixed.data > content_threshold(fixed.data)
    pair = torch.stack([fixed.data[inside], moved.data[inside]]).double()
    lncc = ops.lncc(fixed.data[None], moved.data[None], 9, reduction="none")[0]
    return float(torch.corrcoef(pair)[0, 1]), float(lncc[inside].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixed", type=Path, required=True)
    parser.add_argument("--moving", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for path in options.moving:
        linear = patchreg.register(options.fixed, path, transform="affine")
        networks = patchreg.register(options.fixed, path, refine=False)
        found = patchreg.register(options.fixed, path)
        found.save(options.out / path.name.split(".")[0])
        fixed, moving = found.fixed.volume, found.moving.volume
        for name, registration in (("before", None), ("affine", linear), ("cascade", networks), ("default", found)):
            transform = Affine.identity() if registration is None else registration.transform
            ncc, lncc = correlations(fixed, moving, transform)
            seconds = 0.0 if registration is None else sum(registration.summary["seconds"].values())
            folding = 0.0 if registration is None else registration.summary["folding_percent"]
            rows.append(
                {
                    "moving": path.name,
                    "step": name,
                    "NCC": ncc,
                    "LNCC": lncc,
                    "folding %": folding,
                    "seconds": round(seconds, 1),
                }
            )
            print(rows[-1], flush=True)
    print(table(rows, list(rows[0])))
    print(write_results("scans", rows, fixed=options.fixed.name))


if __name__ == "__main__":
    main()
