"""Training steps on volumes that several GPUs share, by NCCL, against one GPU. With fewer than two GPUs: Gloo on the CPU."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from patchreg.cascade import PatchCascade, Stage
from patchreg.datasets import Pair
from patchreg.distributed.convert import convert_sharded
from patchreg.distributed.slab import split_volume
from patchreg.distributed.strategy import networks_of
from patchreg.losses import LNCC, Diffusion
from patchreg.networks import KeypointAffine, TransMorph, VoxelMorph
from patchreg.networks.swin import SwinSize
from patchreg.spatial import Grid, Volume
from patchreg.training import Objective, RegistrationModule

NETWORKS = {
    "voxelmorph": lambda: VoxelMorph((4, 8, 8), (8, 8), (4,), norm=True, integration_steps=3),
    "transmorph": lambda: TransMorph(SwinSize(8, (2, 2), (2, 2)), (2, 2, 2), drop_path=0.0, memory="checkpoint"),
}
GPUS = torch.cuda.device_count()


def module(name, device):
    torch.manual_seed(0)
    stages = [
        Stage(KeypointAffine((4, 8), (8,), 8), "affine", 16),
        Stage(NETWORKS[name](), "displacement", spacing="image"),
    ]
    with torch.no_grad():  # a displacement that is not zero
        for parameter in list(stages[1].network.parameters())[-2:]:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    cascade = PatchCascade(stages, stop_gradients=False)
    return RegistrationModule(cascade, Objective(LNCC(5), Diffusion(), masked=True)).to(device)


def images(device):
    grid = Grid.aligned((0.0, 0.0, 0.0), (40, 24, 20), 2.0)
    x, y, z = grid.points().float().unbind(-1)
    waves = [torch.sin(0.21 * x + p) + torch.sin(0.17 * y - p) * torch.cos(0.13 * z) for p in (0.0, 0.4)]
    return [Volume((2 + wave)[None].to(device), grid) for wave in waves]


def gradients(made, volumes):
    torch.manual_seed(5)
    value, _ = made.loss([made.prepare(Pair(*volumes))])
    value.backward()
    return value.detach(), [torch.cat([p.grad.flatten() for p in stage.parameters()]) for stage in made.cascade.stages]


def steps(rank, ranks, store, device_type, autocast):
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    for name in NETWORKS:
        with torch.autocast(device_type, torch.bfloat16, enabled=autocast):
            value, wanted = gradients(module(name, device), images(device))
            made = module(name, device)
            for network in networks_of(made):
                convert_sharded(network)
            found, mine = gradients(made, [split_volume(volume, dist.group.WORLD) for volume in images(device)])
        most = 0.1 if autocast else 1e-4
        assert abs(float(found - value)) < most * abs(float(value)), (name, float(found), float(value))
        for stage, (a, b) in enumerate(zip(mine, wanted, strict=True)):
            dist.all_reduce(a)
            wrong = float((a - b).norm() / b.norm())
            assert wrong < 2 * most, (name, stage, wrong)
    dist.destroy_process_group()


def run(tmp_path, device_type, ranks, autocast):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mp.start_processes(
        steps, (ranks, str(tmp_path / "store"), device_type, autocast), nprocs=ranks, start_method="spawn"
    )


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("autocast", [False, True])
def test_gpus_share_a_volume(tmp_path, autocast):
    run(tmp_path, "cuda", min(GPUS, 4), autocast)


def test_processes_on_the_cpu_share_a_volume(tmp_path):
    run(tmp_path, "cpu", 2, False)
