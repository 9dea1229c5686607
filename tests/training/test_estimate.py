"""What is estimated without computing anything equals what a real step takes."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from conftest import REPOSITORY, blobs
from torch import Tensor, nn

from patchreg.cascade import PatchCascade, Stage
from patchreg.datasets import Pair, WorldAugmentation
from patchreg.datasets.files import augmented
from patchreg.errors import InputError
from patchreg.losses import LNCC, Diffusion, MutualInformation
from patchreg.memory import MemoryLog
from patchreg.networks import KeypointAffine, VoxelMorph
from patchreg.networks.transmorph import TransMorph
from patchreg.ops.workspace import workspace
from patchreg.spatial import Grid, Volume
from patchreg.training import Objective, RegistrationModule
from patchreg.training.estimate import KINDS, Setting, inference_peak, training_peak

GRID = Grid.aligned((0, 0, 0), (32, 36, 34), 2.4)
CLOSE = 0.02
BF16 = torch.bfloat16


def held(module: RegistrationModule, optimizer: torch.optim.Optimizer, pairs: list[Pair]) -> list[Tensor]:
    """What there is before a step."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    for pair in pairs:
        tensors += [v.data for v in (pair.fixed, pair.moving, pair.fixed_labels, pair.moving_labels) if v is not None]
        tensors += [w.displacement_mm for w in (pair.fixed_warp, pair.moving_warp) if hasattr(w, "displacement_mm")]
    return tensors


def real_step(module: RegistrationModule, pairs: list[Pair], setting: Setting) -> int:
    """Peak of the second step."""
    optimizer = module.optimization.optimizer(module)
    precision = setting.precision

    def step() -> None:
        with torch.autocast("cpu", precision or BF16, enabled=precision is not None, cache_enabled=False):
            total, _ = module.loss([module.prepare(pair) for pair in pairs])
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    with MemoryLog(workspace) as log:
        for tensor in held(module, optimizer, pairs):
            log.track(tensor)
        log.start()
        step()
    return sum(log.at_peak().values())


def made_pair(setting: Setting, seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    images = [blobs(setting.grid, seed=seed + i) for i in (0, 1)]
    labels: list[Volume | None] = [None, None]
    if setting.labels is not None:
        labels = [Volume((x.data / 20).clamp(max=4).to(setting.labels), x.grid) for x in images]
    augmentation = setting.augmentation or WorldAugmentation()
    return augmented(images[0], images[1], labels[0], labels[1], augmentation, generator, "made")


def voxelmorph(**options):
    return VoxelMorph(**{"encoder": (8, 16, 16), "decoder": (16, 16), "final": (8,), "norm": True, **options})


def whole(network: nn.Module, **options):
    return Stage(network, spacing="image", **options)


def affine(**options):
    return Stage(KeypointAffine((8, 16), (16,), 8), "affine", 24, **options)


def patches(**options):
    return Stage(voxelmorph(), **{"patch_shape": 24, **options})


def transmorph(**options):
    return whole(TransMorph(**{"size": "tiny", "window": (3, 3, 3), "drop_path": 0.1, **options}))


LABELS = {"labels": [1, 2, 3], "overlap_weight": 1.0, "centroid_weight": 1.0}
DEFORMED = WorldAugmentation(rotation_deg=5, deformation_mm=5)
# stages, what the objective has beside LNCC and diffusion, what the setting has beside the grid
CASES = {
    "whole image": (lambda: [whole(voxelmorph())], {}, {}),
    "bf16": (lambda: [whole(voxelmorph())], {}, {"precision": BF16}),
    "checkpoint, bf16": (lambda: [whole(voxelmorph(memory="checkpoint"))], {}, {"precision": BF16}),
    "reversible, bf16": (lambda: [whole(voxelmorph(memory="reversible", reversible=2))], {}, {"precision": BF16}),
    "transformer, checkpoint": (lambda: [transmorph(memory="checkpoint")], {}, {}),
    "transformer, reversible, bf16": (
        lambda: [transmorph(memory="reversible", reversible=True)], {}, {"precision": BF16},
    ),
    "velocity, mutual information": (
        lambda: [whole(voxelmorph(), predicts="velocity")], {"similarity": MutualInformation(), "masked": True}, {},
    ),
    "cascade": (
        lambda: [affine(), patches(spacing=2.4, patches=2)],
        LABELS, {"labels": torch.int16, "batch_size": 2, "augmentation": DEFORMED},
    ),
    "through the chain, frozen, repeated": (
        lambda: [affine(repeats=2), patches(frozen=True), Stage(voxelmorph(integration_steps=4, force_window=5), patch_shape=24, spacing=2.4)],
        {**LABELS, "overlap_stride": 2, "masked": True}, {"labels": torch.int32, "precision": BF16},
    ),
}  # fmt: skip


PATCHES = (lambda: [patches()], {"labels": [1, 2, 3], "overlap_weight": 1.0}, {"labels": torch.int16})
OFFLOADED = (lambda: [whole(voxelmorph(offload=True))], {}, {})


def build(case, **options) -> tuple[RegistrationModule, Setting]:
    torch.manual_seed(0)
    stages, objective, setting = CASES[case] if isinstance(case, str) else case
    cascade = PatchCascade(stages(), stop_gradients="through the chain" not in case)
    weights = {"similarity": LNCC(5), "regularity": Diffusion(), **objective}
    known = {"grid": GRID, "gpu": False, **setting, **options}
    return RegistrationModule(cascade, Objective(**weights)), Setting(**known)


@pytest.mark.parametrize("name", CASES)
def test_a_real_step_takes_what_was_estimated(name):
    module, setting = build(name)
    torch.manual_seed(0)
    pairs = [made_pair(setting, seed) for seed in range(setting.batch_size)]
    measured = real_step(module, pairs, setting)
    estimate = training_peak(build(name)[0], setting)
    assert estimate.total == pytest.approx(measured, rel=CLOSE)
    assert set(estimate.kinds) <= set(KINDS)
    assert estimate.kinds["weights"] == sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    trained = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    assert estimate.kinds["optimizer"] == pytest.approx(2 * trained, rel=0.01)  # two moments in float32
    assert estimate.host == 0


def test_lightning_takes_what_was_estimated(monkeypatch, tmp_path):
    """The benchmark, which measures in Lightning's own loop, on the quick start."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    from memory_estimate import Case, compare

    row = compare(Case("quickstart", (24, 28, 26), 8.0, "bf16-mixed", {"memory": "checkpoint"}, 1), "cpu", False)
    assert row["ratio"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", ["whole image", "cascade"])
def test_a_real_registration_takes_what_was_estimated(name):
    module, setting = build(name)
    images = [blobs(setting.grid, seed=i) for i in (0, 1)]
    everywhere = Volume(torch.ones_like(images[0].data), setting.grid)
    with MemoryLog(workspace) as log:
        for tensor in (*module.parameters(), *module.buffers(), *(image.data for image in images)):
            log.track(tensor)
        fixed, moving = (module.cascade.prepare(image, mask=everywhere) for image in images)
        log.start()
        module.cascade.register(fixed, moving, batch=module.patch_batch)
    device, apart = inference_peak(build(name)[0], setting)
    assert device.total == pytest.approx(sum(log.at_peak().values()), rel=CLOSE)
    assert apart.total < device.total
    assert apart.host > 0


def test_a_larger_image_takes_more_of_the_host_and_hardly_more_of_the_device():
    fine = GRID.with_spacing(0.6)
    small, large = (inference_peak(*build("cascade", grid=grid))[1] for grid in (GRID, fine))
    assert large.total == pytest.approx(small.total, rel=0.05)
    assert large.host - small.host > 0.9 * 2 * 4 * fine.voxels


def test_volumes_that_fit_no_machine_take_no_time():
    start = time.perf_counter()
    module, setting = build("whole image", grid=Grid.aligned((0, 0, 0), (2048, 2048, 2048), 0.1))
    assert training_peak(module, setting).total > 2**40
    assert time.perf_counter() - start < 60


def test_batches_and_label_maps_count_and_nothing_is_random():
    one, again = (training_peak(*build(PATCHES)) for _ in range(2))
    assert one == again
    three = training_peak(*build(PATCHES, batch_size=3))
    assert three.kinds["activations"] == pytest.approx(3 * one.kinds["activations"], rel=CLOSE)
    assert three.kinds["weights"] == one.kinds["weights"]
    wider = training_peak(*build(PATCHES, labels=torch.int32))
    assert wider.kinds["images"] - one.kinds["images"] >= 2 * 2 * GRID.voxels


def test_what_is_offloaded_lies_on_the_host():
    kept, moved = (training_peak(*build(case, gpu=True)) for case in ("whole image", OFFLOADED))
    assert kept.host == 0
    assert moved.host > 0.5 * kept.kinds["activations"]
    assert moved.total < 0.8 * kept.total
    assert training_peak(*build(OFFLOADED)).host == 0  # on a CPU it changes nothing


class Curious(nn.Module):
    """Looks at the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(2, 3, 3, padding=1)

    def forward(self, fixed: Tensor, moving: Tensor) -> Tensor:
        out = self.layer(torch.cat([fixed, moving], dim=1))
        return out if float(out.detach().max()) > 0 else 2 * out


def test_a_network_that_looks_at_the_numbers_is_refused():
    module = RegistrationModule(PatchCascade([whole(Curious())]), Objective(LNCC(5), None))
    for estimate in (training_peak, inference_peak):
        with pytest.raises(InputError, match="cannot be known without running it"):
            estimate(module, Setting(GRID))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, BF16])
def test_on_a_gpu(precision):
    """The allocator's own account; a tenth and the workspace of convolutions may lie between."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    module, setting = build("cascade", grid=Grid.aligned((0, 0, 0), (96, 96, 96), 1.0), gpu=True, precision=precision)
    estimate = training_peak(build("cascade")[0], setting).total
    module = module.cuda()
    pairs = [made_pair(setting, seed).to("cuda") for seed in range(setting.batch_size)]
    optimizer = module.optimization.optimizer(module)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", precision or BF16, enabled=precision is not None, cache_enabled=False):
            total, _ = module.loss([module.prepare(pair) for pair in pairs])
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert estimate == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
