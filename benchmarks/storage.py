"""How far the found transform depends on how the same pair is stored: axes, obliqueness, voxel size.

    python benchmarks/storage.py --label-maps FOLDER --subjects 15 16 [--no-refine]

The pair of benchmarks/accuracy.py is registered as it is stored, then again with both images stored otherwise: axes
reversed and permuted (the same voxels, written in another order), resampled to an oblique grid, and to 1 x 1 x 3 mm.
What differs is the distance between the two answers, in mm, over points within the fixed brain. Beside it stands the
accuracy of each, because 3 mm slices hold less.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from accuracy import BRAIN, make_pair, score
from common import table, write_results

import patchreg
from patchreg.datasets.augmentation import rotation_matrix
from patchreg.inference.registration import resample
from patchreg.io import read_image
from patchreg.spatial import Affine, Grid, Volume


def reoriented(path: Path, codes: str, out: Path) -> Path:
    """The same voxels in another order."""
    image = nib.load(path)
    wanted = nib.orientations.axcodes2ornt(tuple(codes))
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted)
    nib.save(image.as_reoriented(turn), out)
    assert "".join(nib.aff2axcodes(nib.load(out).affine)) == codes
    return out


def resampled(path: Path, grid: Grid, out: Path) -> Path:
    """The image on another grid, averaged over the voxels of that grid as a scanner would."""
    volume = read_image(path, "image").volume
    factors = [max(1, round(a / b)) for a, b in zip(grid.spacing, sorted(volume.grid.spacing), strict=True)]
    fine = Grid(
        [n * f for n, f in zip(grid.shape, factors, strict=True)],
        grid.affine
        @ torch.tensor(
            [[1 / factors[0], 0, 0, (1 / factors[0] - 1) / 2], [0, 1 / factors[1], 0, (1 / factors[1] - 1) / 2],
             [0, 0, 1 / factors[2], (1 / factors[2] - 1) / 2], [0, 0, 0, 1]], dtype=torch.float64),
    )  # fmt: skip
    data = torch.nn.functional.avg_pool3d(resample(volume, Affine.identity(), fine).data, factors)
    nib.save(nib.Nifti1Image(data[0].numpy(), grid.affine.numpy()), out)
    return out


def oblique(grid: Grid) -> Grid:
    """A turned grid of the same voxels' size that holds all of another one."""
    direction = rotation_matrix(torch.tensor([0.25, -0.15, 0.3]))
    low, high = grid.bounds()
    size = direction.T.abs() @ (high - low)
    spacing = torch.tensor(sorted(grid.spacing), dtype=torch.float64)
    shape = torch.ceil(size / spacing)
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = (low + high) / 2 - affine[:3, :3] @ ((shape - 1) / 2)
    return Grid([int(n) for n in shape], affine)


def thick(grid: Grid) -> Grid:
    """Voxels of 1 x 1 x 3 mm over the same part of the world."""
    low, high = grid.bounds()
    spacing = (1.0, 1.0, 3.0)
    shape = [int(np.ceil(float(s) / v)) for s, v in zip(high - low, spacing, strict=True)]
    return Grid.aligned((low + high) / 2, shape, spacing)


def brain_points(labels: Volume, count: int = 20_000) -> torch.Tensor:
    """Points (N, 3) of the brain in world mm."""
    inside = torch.isin(labels.data[0], torch.tensor(BRAIN, dtype=labels.data.dtype)).nonzero()
    return labels.grid.to_world(inside[:: max(1, inside.shape[0] // count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label-maps", type=Path, required=True)
    parser.add_argument("--subjects", type=int, nargs=2, default=(15, 16))
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--no-refine", action="store_true", help="the networks' answer alone")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = make_pair(folder, options.label_maps, tuple(options.subjects), "t1", options.seed)
        points = brain_points(read_image(files["fixed_labels"], "labels").volume)
        reference = None
        for storage in ("RAS", "LAS", "LPS", "PIR", "oblique", "1 x 1 x 3 mm"):
            stored = []
            for name in ("fixed", "moving"):
                out = folder / f"{name} {storage}.nii.gz"
                grid = read_image(files[name], "image").volume.grid
                if storage == "oblique":
                    stored.append(resampled(files[name], oblique(grid), out))
                elif storage == "1 x 1 x 3 mm":
                    stored.append(resampled(files[name], thick(grid), out))
                else:
                    stored.append(reoriented(files[name], storage, out))
            found = patchreg.register(*stored, refine=not options.no_refine)
            reference = reference or found
            row: dict[str, object] = {"stored as": storage}
            for name, ours, first in (
                ("affine", found.affine, reference.affine),
                ("whole", found.transform, reference.transform),
            ):
                distance = (ours(points) - first(points)).norm(dim=1)
                row |= {f"{name}: mean mm": float(distance.mean()), f"{name}: 95 % mm": float(distance.quantile(0.95))}
            row["dice"] = score(found.transform, files)["dice"]
            rows.append(row)
            print(row, flush=True)
    print(table(rows, list(rows[0])))
    print(
        write_results(
            "storage_networks" if options.no_refine else "storage",
            rows,
            subjects=list(options.subjects),
            seed=options.seed,
        )
    )


if __name__ == "__main__":
    main()
