"""Training and inference of a cascade on images that are shared out, against one process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from ranks.comparison import smooth

from patchreg.cascade import PatchCascade, Stage
from patchreg.datasets import Pair
from patchreg.distributed.convert import convert_sharded
from patchreg.distributed.slab import Slab, split_volume
from patchreg.distributed.strategy import networks_of
from patchreg.losses import LNCC, Diffusion
from patchreg.networks import KeypointAffine
from patchreg.spatial import DisplacementField, Grid, Volume
from patchreg.training import Objective, RegistrationModule
from patchreg.training.evaluation import evaluate


class Pointwise(torch.nn.Module):
    """A displacement that depends on each voxel alone."""

    def __init__(self, size=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([size, -0.5 * size, 0.7 * size]))

    def forward(self, fixed, moving):
        return self.scale[:, None, None, None] * torch.cat([fixed - moving, fixed * moving, moving], dim=1)


def grid(shape, spacing, degrees, offset):
    turn = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    c, s = torch.cos(turn), torch.sin(turn)
    affine = torch.eye(4, dtype=torch.float64)
    rotation = torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)
    affine[:3, :3] = rotation @ torch.diag(torch.tensor(spacing, dtype=torch.float64))
    affine[:3, 3] = torch.tensor(offset, dtype=torch.float64)
    return Grid(shape, affine)


def made_pair():
    """Different sizes, spacings and directions, labels on grids of their own, both images seen through deformations."""
    fixed_grid = grid((30, 22, 20), (2.0, 2.5, 3.0), 8.0, (-30.0, -20.0, -25.0))
    moving_grid = grid((21, 26, 32), (3.0, 2.0, 2.0), -5.0, (-28.0, -24.0, -30.0))
    volumes = [
        Volume(smooth((1, 1, *g.shape), n, torch.float32, grad=False)[0], g)
        for n, g in ((1, fixed_grid), (2, moving_grid))
    ]
    labels = [Volume((4 * v.data).round().to(torch.int32), v.grid) for v in volumes]
    bend = Grid.aligned((0.0, 0.0, 0.0), (6, 6, 6), 14.0)
    warps = [
        DisplacementField(bend, 6 * smooth((1, 3, 12, 12, 12), n, torch.float32, grad=False)[:, :, 3:9, 3:9, 3:9] - 3)
        for n in (3, 4)
    ]
    return Pair(*volumes, *labels, *warps, "made")


def shared_out(pair, group, dims):
    """The pair as the strategy hands it to a rank."""
    cut = {
        name: split_volume(getattr(pair, name), group, dim)
        for name, dim in zip(("fixed", "moving", "fixed_labels", "moving_labels"), (*dims, *dims), strict=True)
    }
    return dataclasses.replace(pair, **cut)


def module(stop_gradients, repeats=1):
    torch.manual_seed(1)
    stages = [
        Stage(KeypointAffine((4, 8), (8,), 8), "affine", 16),
        Stage(KeypointAffine((4, 8), (8,), 8), "affine", 16, repeats=2),
        Stage(Pointwise(), "displacement", spacing="image", repeats=repeats),
        Stage(Pointwise(0.3), "velocity", 16, spacing=2.0, patches=2),
    ]
    objective = Objective(
        LNCC(5), Diffusion(), regularity_weight=0.3, labels=[1, 2, 3], overlap_weight=0.5, overlap_stride=2,
        centroid_weight=0.2, masked=True,
    )  # fmt: skip
    return RegistrationModule(PatchCascade(stages, stop_gradients=stop_gradients), objective)


def training(group, stop_gradients, dims):
    pair = made_pair()
    torch.set_default_dtype(torch.float32)
    plain = module(stop_gradients)
    torch.manual_seed(5)
    value, terms = plain.loss([plain.prepare(pair)])
    value.backward()
    split = module(stop_gradients)
    for network in networks_of(split):
        convert_sharded(network)
    torch.manual_seed(5)
    mine = shared_out(pair, group, dims)
    assert isinstance(mine.fixed.grid, Slab)
    found, found_terms = split.loss([split.prepare(mine)])
    found.backward()
    for name, term in terms.items():
        assert torch.allclose(found_terms[name], term, rtol=2e-5, atol=1e-6), (
            name,
            float(found_terms[name]),
            float(term),
        )
    assert torch.allclose(found, value, rtol=1e-5)
    for index, stages in enumerate(zip(split.cascade.stages, plain.cascade.stages, strict=True)):
        mine, wanted = (torch.cat([p.grad.flatten() for p in stage.parameters()]) for stage in stages)
        dist.all_reduce(mine, group=group)
        wrong = float((mine - wanted).norm() / wanted.norm())
        assert wrong < 2e-5, (index, wrong)


@pytest.mark.parametrize(
    ("ranks", "stop_gradients", "dims"), [(2, True, (2, 2)), (3, False, (2, 4)), (2, False, (3, 3))]
)
def test_training(pool, ranks, stop_gradients, dims):
    pool.run(ranks, training, stop_gradients, dims)


def inference(group, dims):
    pair = made_pair()
    plain = module(True, repeats=2)
    ready = plain.prepare(pair)
    result = plain.register(ready)
    metrics = evaluate(ready, result, [1, 2, 3]).metrics
    mine = plain.prepare(shared_out(pair, group, dims))
    found = plain.register(mine)
    assert any(isinstance(t.grid, Slab) for t in found.transform.transforms if isinstance(t, DisplacementField))
    points = 20 * torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    away = (found.transform(points) - result.transform(points)).norm(dim=1)
    assert float(away.max()) < 1e-3, away.max()
    for name, value in evaluate(mine, found, [1, 2, 3]).metrics.items():
        assert value == pytest.approx(metrics[name], rel=1e-3, abs=2e-3), name
    if result.spread is not None:
        whole = found.spread.grid.gathered(found.spread.data)
        assert torch.allclose(whole, result.spread.data, atol=1e-3)


@pytest.mark.parametrize(("ranks", "dims"), [(2, (2, 2)), (3, (2, 4))])
def test_inference(pool, ranks, dims):
    pool.run(ranks, inference, dims)
