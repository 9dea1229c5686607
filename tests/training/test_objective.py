from __future__ import annotations

import pytest
import torch
from cascade_parts import Constant, ConstantAffine, made_pair, prepared, small_cascade
from conftest import blobs, oriented_grid

from patchreg.cascade import PatchCascade, PreparedPair, Stage
from patchreg.errors import InputError
from patchreg.losses import LNCC, MSE, Diffusion, LabelSet, centroid_distance_mm
from patchreg.spatial import Affine, Volume
from patchreg.training import Objective


def labelled_pair() -> PreparedPair:
    fixed, moving = (blobs(oriented_grid(o, (2.0, 2.0, 2.0)), seed=1) for o in ("RAS", "LPS"))
    labels = [Volume((v.data / v.data.max() * 4.99).int(), v.grid) for v in (fixed, moving)]
    return PreparedPair(prepared(fixed, labels[0]), prepared(moving, labels[1]))


def test_the_total_is_the_weighted_sum_of_its_terms(generator):
    objective = Objective(
        LNCC(5), Diffusion(), similarity_weight=2.0, regularity_weight=[9.0, 0.5, 0.25], labels=[1, 2, 3, 4], overlap_weight=3.0,
        centroid_weight=0.7, stage_weights=[1.0, 10.0, 100.0],
    )  # fmt: skip
    total, terms = objective(small_cascade()([labelled_pair()], generator))
    expected = 1.0 * (2 * terms["stage0/similarity"] + 0.07 * terms["stage0/centroids_mm"])
    for stage, weight, regularity in ((1, 10.0, 0.5), (2, 100.0, 0.25)):
        expected = expected + weight * (
            2 * terms[f"stage{stage}/similarity"]
            + regularity * terms[f"stage{stage}/regularity"]
            + 3 * terms[f"stage{stage}/overlap"]
        )
    assert torch.allclose(total.double(), expected.double(), rtol=1e-5)
    total.backward()


def test_a_match_costs_nothing_and_a_shift_does():
    pair = labelled_pair()
    objective = Objective(MSE(), Diffusion(), labels=[1, 2, 3, 4], overlap_weight=1.0)
    matched, shifted = (
        objective(PatchCascade([Stage(Constant(v), patch_shape=32, spacing=2.0)])([pair]))[1]
        for v in ((0, 0, 0), (4.0, 0, 0))
    )
    assert matched["stage0/similarity"] < 1e-4
    assert matched["stage0/overlap"] < 0.2  # linear weights blur the edges of labels
    assert shifted["stage0/similarity"] > 100 * matched["stage0/similarity"]
    assert shifted["stage0/overlap"] > 0.3
    assert shifted["stage0/regularity"] == 0


def test_a_stride_estimates_the_same_overlap():
    pair = labelled_pair()
    values = []
    for stride in (1, 2):
        torch.manual_seed(0)
        cascade = PatchCascade([Stage(Constant((2.0, 0, 0)), patch_shape=48, spacing=1.5)])
        objective = Objective(None, None, labels=[1, 2, 3, 4], overlap_weight=1.0, overlap_stride=stride)
        values.append(float(objective(cascade([pair]))[1]["stage0/overlap"]))
    assert values[1] == pytest.approx(values[0], abs=0.03)


def test_centroids_are_measured_through_the_stage():
    pair = labelled_pair()
    shift = torch.eye(3, 4)
    shift[0, 3] = 0.1
    cascade = PatchCascade([Stage(ConstantAffine(shift), "affine", 16)])
    output = cascade([pair])[0]
    objective = Objective(None, None, labels=[1, 2, 3, 4], centroid_weight=1.0)
    found = objective([output])[1]["stage0/centroids_mm"]
    moved = 0.1 * 8 * output.grids[0].spacing[0]
    assert float(found) == pytest.approx(moved, abs=0.6)  # centroids of labels thinned to 4 mm
    labels = LabelSet([1, 2, 3, 4])
    assert float(
        centroid_distance_mm(pair.fixed.labels.at(4.0), pair.moving.labels.at(4.0), Affine.identity(), Affine.identity(), labels)
    ) < 1.0  # fmt: skip


def test_pairs_without_labels_need_a_similarity(generator):
    outputs = small_cascade()([made_pair()], generator)
    with pytest.raises(InputError, match="do they have labels"):
        Objective(None, None, labels=[1], overlap_weight=1.0)(outputs)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"similarity": None, "regularity": Diffusion()}, "nothing to minimise"),
        ({"similarity": None, "regularity": None, "overlap_weight": 1.0}, "need labels"),
    ],
)
def test_bad_objectives(arguments, says):
    with pytest.raises(InputError, match=says):
        Objective(**arguments)


def test_too_few_weights_are_named(generator):
    outputs = small_cascade()([made_pair()], generator)
    with pytest.raises(InputError, match="regularity_weight has 1 numbers, but the cascade has a stage 2"):
        Objective(MSE(), Diffusion(), regularity_weight=[1.0])(outputs)
