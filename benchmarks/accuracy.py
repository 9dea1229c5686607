"""Dice, folding and seconds on images synthesised from label maps that were never trained on, beside ANTs and demons.

    python benchmarks/accuracy.py --label-maps FOLDER --subjects 15 16 [--contrast random] [--ants-python PYTHON]

Both subjects in turn are the fixed one. The images of a pair have the same T1-like contrast, or each a random one, with
noise, bias and blur of their own. Every method gets the same files and is scored by the same code: its transform moves
the label map, and Dice is the mean over FreeSurfer's brain structures. ANTs runs where antspyx is installed (in a
process of its own, with --ants-python), demons in SimpleITK after an affine map found by SimpleITK.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from common import table, write_results

import patchreg
from patchreg.datasets.synthesis import Synthesis, crop_to_content
from patchreg.inference.registration import resample
from patchreg.io import read_image, read_transform
from patchreg.losses import dice
from patchreg.spatial import Affine, Composite, Transform, folding_percent, jacobian_determinant

BRAIN = (
    2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 26, 28,
    41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60,
)  # fmt: skip
T1 = {
    0.9: (2, 41, 7, 46, 16, 28, 60), 0.6: (3, 42, 8, 47, 17, 53, 18, 54), 0.75: (10, 49), 0.65: (11, 50, 12, 51, 26, 58),
    0.8: (13, 52), 0.15: (4, 43, 5, 44, 14, 15, 24), 0.5: (507, 511, 25, 57, 85, 72, 30, 62), 0.3: (515, 516, 530),
    0.7: (506, 509, 514, 512, 508, 502),
}  # fmt: skip

ANTS = """
import ants, sys, time, json
fixed, moving, kind, out = sys.argv[1:]
f, m = ants.image_read(fixed), ants.image_read(moving)
start = time.perf_counter()
found = ants.registration(f, m, kind, outprefix=out)
print(json.dumps({"seconds": time.perf_counter() - start, "transforms": found["fwdtransforms"]}))
"""


def make_pair(folder: Path, maps: Path, subjects: tuple[int, int], contrast: str, seed: int) -> dict[str, Path]:
    """Synthesise and write the images and label maps of a pair."""
    t1 = torch.zeros(1000)
    for value, labels in T1.items():
        t1[list(labels)] = value
    synthesis = Synthesis(thick_probability=0.0, bias=0.3, blur_mm=0.7, noise=0.06, gamma=0.0)
    generator = torch.Generator().manual_seed(seed)
    files = {}
    for name, subject in zip(("fixed", "moving"), subjects, strict=True):
        labels = crop_to_content(read_image(maps / f"subject_{subject:02d}.nii.gz", "labels").volume)
        values = t1 if contrast == "t1" else synthesis.draw_contrast(t1.numel() - 1, generator)
        image = synthesis.make(labels, values, False, generator)
        for kind, volume, dtype in (("", image, np.float32), ("_labels", labels, np.int16)):
            files[name + kind] = folder / f"{name}{kind}.nii.gz"
            nib.save(
                nib.Nifti1Image(volume.data[0].numpy().astype(dtype), volume.grid.affine.numpy()), files[name + kind]
            )
    return files


def score(transform: Transform, files: dict[str, Path]) -> dict[str, float]:
    """Mean Dice, folding over the head and regularity, the same way for everybody."""
    fixed, moving = (read_image(files[f"{name}_labels"], "labels").volume for name in ("fixed", "moving"))
    moved = resample(moving, transform, fixed.grid, "nearest")
    values = dice(fixed.data, moved.data, BRAIN)
    mapped = transform.on(fixed.grid)
    determinant = jacobian_determinant(mapped)
    head = fixed.data[None] > 0
    return {
        "dice": float(values.nanmean()),
        "folding %": folding_percent(determinant, head),
        "sd log J": float(determinant[head].clamp(min=1e-3).log().std()),
    }


def run_ants(files: dict[str, Path], kind: str, python: str, folder: Path) -> tuple[Transform, float]:
    """ANTs in its own process; its transforms are read back as ITK files."""
    arguments = [python, "-c", ANTS, str(files["fixed"]), str(files["moving"]), kind, str(folder / f"ants_{kind}_")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    chain = [read_transform(Path(p)) for p in found["transforms"]]  # fixed points go through the warp, then the affine
    return Composite(chain), found["seconds"]


def run_demons(files: dict[str, Path], folder: Path) -> tuple[Transform, float]:
    """SimpleITK: affine by mutual information from the centres of mass, then diffeomorphic demons."""
    fixed, moving = (sitk.ReadImage(str(files[n]), sitk.sitkFloat32) for n in ("fixed", "moving"))
    start = time.perf_counter()
    initial = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.AffineTransform(3), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(0.05, seed=1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([2, 1])
    method.SetInitialTransform(initial, inPlace=True)
    method.Execute(fixed, moving)
    warped = sitk.Resample(moving, fixed, initial, sitk.sitkLinear, 0.0)
    warped = sitk.HistogramMatching(warped, fixed, 256, 15)
    demons = sitk.DiffeomorphicDemonsRegistrationFilter()
    demons.SetNumberOfIterations(60)
    demons.SetStandardDeviations(1.5)
    field = None
    for factor in (4, 2, 1):
        small_fixed, small_moving = (
            sitk.Shrink(sitk.SmoothingRecursiveGaussian(i, 0.5 * factor), [factor] * 3) for i in (fixed, warped)
        )
        if field is None:
            field = demons.Execute(small_fixed, small_moving)
        else:
            field = demons.Execute(small_fixed, small_moving, sitk.Resample(field, small_fixed))
    seconds = time.perf_counter() - start
    composite = sitk.CompositeTransform(
        [initial, sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))]
    )
    composite.FlattenTransform()
    sitk.WriteTransform(composite, str(folder / "demons.h5"))
    return read_transform(folder / "demons.h5"), seconds


def ours(files: dict[str, Path], **options: object) -> tuple[Transform, float]:
    """patchreg; the seconds include reading the files."""
    start = time.perf_counter()
    found = patchreg.register(files["fixed"], files["moving"], **options)
    return found.transform, time.perf_counter() - start


Method = Callable[[], tuple[Transform, float]]
FIGURES = ("dice", "folding %", "sd log J", "seconds")


def methods(files: dict[str, Path], folder: Path, options: argparse.Namespace) -> dict[str, Method]:
    """What is compared. Demons compare intensities, so they are left out where the contrasts differ."""
    found: dict[str, Method] = {
        "before": lambda: (Affine.identity(), 0.0),
        "patchreg affine": lambda: ours(files, transform="affine"),
        "patchreg cascade (no refinement)": lambda: ours(files, refine=False),
        "patchreg (default)": lambda: ours(files),
    }
    if options.contrast == "t1":
        found["SimpleITK affine, demons"] = lambda: run_demons(files, folder)
    else:
        found["patchreg --refine"] = lambda: ours(files, refine=True)
    if options.ants_python:
        for kind in options.ants_kinds:
            found[f"ANTs {kind}"] = lambda kind=kind: run_ants(files, kind, options.ants_python, folder)
    return found


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method's mean over the pairs."""
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        found.append({"method": name, **{f: float(np.mean([row[f] for row in own])) for f in FIGURES}})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label-maps", type=Path, required=True)
    parser.add_argument("--subjects", type=int, nargs=2, default=(15, 16))
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--ants-python", help="a Python that has antspyx")
    parser.add_argument("--ants-kinds", nargs="*", default=["Affine", "SyN"])
    parser.add_argument("--contrast", choices=["t1", "random"], default="t1")
    parser.add_argument("--name", default="accuracy")
    options = parser.parse_args()
    rows = []
    for subjects in (tuple(options.subjects), tuple(reversed(options.subjects))):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            files = make_pair(folder, options.label_maps, subjects, options.contrast, options.seed)
            for name, method in methods(files, folder, options).items():
                transform, seconds = method()
                pair = f"{subjects[1]} onto {subjects[0]}"
                rows.append({"method": name, "pair": pair, **score(transform, files), "seconds": round(seconds, 1)})
                print(rows[-1], flush=True)
    print(table(means(rows), ["method", *FIGURES]))
    print(write_results(options.name, rows, contrast=options.contrast, seed=options.seed))


if __name__ == "__main__":
    main()
