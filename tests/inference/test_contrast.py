"""Whether a pair is refined on itself is decided by whether bright is bright in both images."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from cascade_parts import small_cascade
from inference_parts import head, save

import patchreg
from patchreg.cascade import Prepared
from patchreg.cascade.prepared import Normalization
from patchreg.inference.refine import Refinement, contrast_agreement
from patchreg.spatial import Affine, Volume

QUICK = Refinement(spacings_mm=(6.0,), iterations=(3,), affine_iterations=3)


def painted(labels: Volume, seed: int) -> Volume:
    """Every label in an intensity of its own."""
    values = torch.rand(1000, generator=torch.Generator().manual_seed(seed))
    values[0] = 0
    return Volume(values[labels.data.long()] * 1000, labels.grid)


@pytest.fixture(scope="module")
def images():
    image, labels = head(spacing_mm=4.0)
    return {"same": image, "other": painted(labels, 1), "inverted": Volume(image.data.max() - image.data, image.grid)}


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("same", 0.99, 1.0), ("inverted", -1.0, -0.98), ("other", -0.7, 0.7)]
)
def test_agreement(images, kind, low, high):
    fixed, moving = (Prepared(images[k], Normalization()) for k in ("same", kind))
    assert low <= contrast_agreement(fixed, moving, Affine.identity(), 4.0) <= high


def test_agreement_survives_misalignment(images):
    fixed = Prepared(images["same"], Normalization())
    assert contrast_agreement(fixed, fixed, Affine.translation((6.0, -5.0, 4.0)), 4.0) > 0.9


@pytest.mark.parametrize(
    ("kind", "asked", "refined"),
    [("same", None, True), ("same", False, False), ("other", None, False), ("other", True, True)],
)
def test_refined_where_it_helps_or_is_asked_for(images, kind, asked, refined, tmp_path, caplog):
    files = [save(images[k], tmp_path / f"{k}.nii.gz", np.float32) for k in ("same", kind)]
    with caplog.at_level(logging.WARNING):
        found = patchreg.register(*files, small_cascade(), refine=asked, refinement=QUICK)
    assert found.summary["refined"] is refined
    assert ("refine" in found.summary["seconds"]) is refined
    assert ("differ in contrast" in caplog.text) is (kind == "other" and asked is None)


def test_mutual_information_is_a_request(images, tmp_path):
    files = [save(images[k], tmp_path / f"{k}.nii.gz", np.float32) for k in ("same", "other")]
    settings = Refinement(similarity="mi", spacings_mm=(6.0,), iterations=(2,), affine_iterations=2)
    assert patchreg.register(*files, small_cascade(), refinement=settings).summary["refined"] is True
