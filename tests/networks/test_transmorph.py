from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import nn

from patchreg import ops
from patchreg.errors import InputError
from patchreg.fake import Fakes
from patchreg.losses import Diffusion
from patchreg.memory import LivePeak
from patchreg.networks import SwinSize, TransMorph, TransMorphAffine
from patchreg.networks.padding import pad_to_multiple
from patchreg.networks.transmorph_affine import compose_affine

SMALL = SwinSize(4, (2, 2), (1, 2))
"""Two levels: sizes are padded to multiples of 8."""


def network(seed: int = 0, std: float = 0.1, **options) -> TransMorph:
    """A small one whose answer is far from zero."""
    torch.manual_seed(seed)
    made = TransMorph(SMALL, options.pop("window", (2, 3, 2)), **options)
    nn.init.normal_(made.decoder.flow.weight, std=std)
    return made


def pair(generator, shape=(11, 24, 17), batch=1):
    return [torch.rand((batch, 1, *shape), generator=generator) for _ in range(2)]


@pytest.mark.parametrize(("size", "millions"), [("tiny", 0.24), ("small", 11.76), ("base", 46.77), ("large", 108.34)])
def test_sizes_are_those_of_the_paper(size, millions):
    with torch.device("meta"):
        made = TransMorph(size)
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(
        millions * 1e6, rel=5e-3 if size != "tiny" else 0.02
    )


def test_a_size_of_ones_own_comes_from_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network")
    arguments = {"size": {"embed": 4, "depths": [1, 3], "heads": [1, 2]}, "window": [2, 2, 2]}
    config = {"network": {"class_path": "patchreg.networks.TransMorph", "init_args": arguments}}
    made = parser.instantiate(parser.parse_object(config)).network
    assert [len(stage.blocks) for stage in made.encoder.stages] == [1, 3]


def test_importing_the_networks_does_not_load_timm():
    code = "import sys, patchreg.networks; print('timm' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == "False"


@pytest.mark.parametrize("shape", [(32, 32, 32), (33, 9, 20)])
def test_takes_any_size_and_starts_near_the_identity(shape, generator):
    torch.manual_seed(0)
    made = TransMorph("tiny", window=(5, 2, 3))
    out = made(*pair(generator, shape, batch=2))
    assert out.shape == (2, 3, *shape)
    assert out.dtype == torch.float32
    assert out.abs().max() < 0.01
    out.square().mean().backward()
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize(
    "options", [{"reduction": 2}, {"reduction": 4}, {"bspline": 3}, {"force_window": 5}, {"channels": 2}]
)
def test_options_change_no_shapes(options, generator):
    fixed, moving = (x.repeat(1, options.get("channels", 1), 1, 1, 1) for x in pair(generator))
    made = network(**options)
    out = made(fixed, moving)
    assert out.shape == (1, 3, *fixed.shape[2:])
    out.square().mean().backward()
    assert all(p.grad is not None for p in made.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert made(fixed, moving).dtype == torch.float32


def plain(made: TransMorph, fixed: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
    """The published decoder, written with the layers of torch, behind the same encoder."""

    def conv(layer, x):
        return F.leaky_relu(F.instance_norm(layer(x)), 0.01)

    x, cut = pad_to_multiple(torch.cat([fixed, moving], dim=1), made.encoder.multiple)
    tokens = made.encoder(x)
    norms = [made.decoder.steps[0].norm, made.decoder.norm]
    features = [norm(t).movedim(-1, 1) for norm, t in zip(norms, tokens, strict=True)]
    first, half, full = made.decoder.steps
    skips = [features[0], conv(half.look, F.avg_pool3d(x, 3, 2, padding=1)), conv(full.look, x)]
    out = features[1]
    for step, skip in zip((first, half, full), skips, strict=True):
        out = F.interpolate(out, scale_factor=2, mode="trilinear")
        out = conv(step.conv, conv(step.join, torch.cat([out, skip], dim=1)))
    return made.decoder.flow(out)[:, :, cut[0], cut[1], cut[2]]


@pytest.mark.parametrize("memory", ["stored", "checkpoint"])
def test_the_decoder_is_the_published_one(memory, generator, tolerances):
    made = network(memory=memory, drop_path=0.0).double()
    images = [x.double() for x in pair(generator, batch=2)]
    found, expected = made(*images), plain(made, *images)
    assert torch.allclose(found, expected, atol=tolerances.value_float64)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    parameters = list(made.parameters())
    for a, b in zip(*(torch.autograd.grad(y, parameters, weight) for y in (found, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_padding_does_not_shift_the_answer(generator):
    """An odd size gets the answer of the same image with a rim of zeros, cut at the right place."""
    made = network(drop_path=0.0)
    fixed, moving = pair(generator, (13, 9, 16))
    rim = (0, 0, 3, 4, 1, 2)
    whole = made(F.pad(fixed, rim), F.pad(moving, rim))
    assert torch.allclose(made(fixed, moving), whole[..., 1:14, 3:12, :], atol=1e-5)


def results(made: nn.Module, images: list[torch.Tensor]) -> list[torch.Tensor]:
    """The answer and all gradients; the same random numbers every time."""
    images = [x.double().requires_grad_() for x in images]
    torch.manual_seed(7)
    out = made.double()(*images)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in (*images, *made.parameters()))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": 2, "integration_steps": 3},
        {"reduction": 4, "bspline": 3},
        {"force_window": 5},
        {"offload": True},
    ],
)
@pytest.mark.parametrize("reversible", [False, True])
def test_policies_agree(options, reversible, generator):
    """With paths dropped at random, too."""
    images = pair(generator, (9, 16, 8), batch=2)
    expected = results(network(drop_path=0.5, reversible=reversible, **options), images)
    for memory in ("checkpoint", *(["reversible"] if reversible else [])):
        found = results(network(drop_path=0.5, reversible=reversible, memory=memory, **options), images)
        for a, b in zip(found, expected, strict=True):
            assert (a - b).norm() <= 1e-10 * b.norm() + 1e-10


def test_paths_are_dropped_in_training_alone(generator):
    made, images = network(drop_path=0.9), pair(generator)
    torch.manual_seed(0)
    assert not torch.equal(made(*images), made(*images))
    made.eval()
    assert torch.equal(made(*images), made(*images))


def test_a_reversible_network_is_another(generator):
    images = pair(generator)
    plain_one, reversible = network(drop_path=0.0), network(drop_path=0.0, reversible=True)
    assert sum(p.numel() for p in reversible.parameters()) == sum(p.numel() for p in plain_one.parameters())
    assert not torch.allclose(reversible(*images), plain_one(*images), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "size"), [({"reduction": 1}, 4), ({"reduction": 2}, 4), ({"bspline": 4, "reduction": 4}, 16)]
)
def test_the_diffeomorphic_variant_does_not_fold(options, size, generator):
    """A velocity so rough that it folds as a displacement."""
    images = pair(generator, (16, 24, 16))
    both = torch.cat(images, dim=1)
    folds = {}
    for steps in (0, 7):
        made = network(integration_steps=steps, **options).eval()
        with torch.no_grad():
            made.decoder.flow.weight.mul_(size / made.decoder(made.encoder(both), both).abs().max())
            u = made(*images)
        rows = [torch.gradient(u, dim=d)[0] + torch.eye(3)[d - 2].view(1, 3, 1, 1, 1) for d in (2, 3, 4)]
        jacobian = torch.linalg.det(torch.stack(rows, dim=-1).permute(0, 2, 3, 4, 1, 5))
        folds[steps] = float((jacobian <= 0).double().mean())
    assert folds[7] < 0.002
    assert folds[0] > 10 * folds[7]


@pytest.mark.parametrize("options", [{}, {"reduction": 2}, {"bspline": 3, "reduction": 2}, {"bspline": 5}])
@pytest.mark.parametrize("steps", [0, 5])
def test_a_constant_flow_is_the_same_displacement_at_any_resolution(options, steps, generator):
    made = network(std=0.0, integration_steps=steps, **options)
    nn.init.constant_(made.decoder.flow.bias, 1.5)
    assert torch.allclose(made(*pair(generator)), torch.tensor(1.5), atol=1e-4)


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_control_points_lie_where_the_flow_has_them(reduction, generator):
    """A linear flow comes out as itself, away from the border: at its place, for odd sizes, too."""
    made = network(reduction=reduction, bspline=3)
    shape = (21, 40, 29)
    padded, cut = pad_to_multiple(torch.zeros(1, 1, *shape), made.encoder.multiple)
    axes = [
        torch.arange(0, n, reduction) + (reduction - 1) / 2 - c.start
        for n, c in zip(padded.shape[2:], cut, strict=True)
    ]
    flow = torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]
    made.decoder.forward = lambda *_: flow
    voxels = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in shape], indexing="ij"))[None]
    inside = (..., slice(6, -6), slice(6, -6), slice(6, -6))
    assert torch.allclose(made(*pair(generator, shape))[inside], voxels[inside], atol=1e-3)


def peak(size, **options) -> tuple[float, float]:
    """Of a training step on a whole head, forward, loss and backward, and what is kept between, in GiB."""
    fakes, made = Fakes(), TransMorph(size, **options)
    fakes.convert(made)
    fixed, moving = (fakes.empty((1, 1, 160, 192, 224)) for _ in range(2))
    with fakes, LivePeak() as counted:
        u = made(fixed, moving)
        loss = Diffusion()(u, (1.0, 1.0, 1.0)) - ops.lncc(fixed, ops.warp(moving, u), 9)
        kept = counted.live
        loss.backward()
    return counted.peak / 2**30, kept / 2**30


def test_a_checkpoint_takes_a_third_at_most():
    """The first two levels of the base network, where the memory goes."""
    size = SwinSize(96, (2, 2), (4, 4))
    stored, checkpoint = peak(size), peak(size, memory="checkpoint")
    assert checkpoint[0] < stored[0] / 3
    assert checkpoint[1] < stored[1] / 3


@pytest.mark.slow
def test_memory_of_the_published_size():
    assert peak("base")[0] < 7.3
    assert peak("base", memory="checkpoint")[0] < 2.2
    deep = SwinSize(96, (12, 2), (4, 4))
    blocks, output = (peak(deep, memory=memory, reversible=True)[0] for memory in ("checkpoint", "reversible"))
    assert output < blocks - 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"size": "huge"}, "size must be one of tiny, small, base, large, or a SwinSize, got 'huge'"),
        ({"window": (5, 6)}, "three positive numbers of tokens"),
        ({"drop_path": 1.5}, "drop_path"),
        ({"reduction": 3}, "reduction must be 1, 2 or 4, got 3"),
        ({"bspline": 0}, "bspline must be a spacing of at least one voxel"),
        ({"integration_steps": -1}, "integration_steps"),
        ({"force_window": 4}, "force_window"),
        ({"memory": "reversible"}, "TransMorph has no reversible blocks"),
        ({"memory": "some"}, "memory must be one of"),
    ],
)
def test_what_cannot_be_is_refused(arguments, says):
    with pytest.raises(InputError, match=says):
        TransMorph(**({"size": "tiny"} | arguments))


@pytest.mark.parametrize("kind", [TransMorph, TransMorphAffine])
def test_a_window_larger_than_the_grid_is_refused(kind):
    made = kind("tiny", window=(9, 8, 8))
    image = torch.zeros(1, 1, 30, 32, 32)
    with pytest.raises(
        InputError, match=r"\(30, 32, 32\).*grid of \(8, 8, 8\) tokens.*larger patches, or .* smaller window"
    ):
        made(image, image)


def test_affine_is_exactly_the_identity_at_the_start(generator):
    made = TransMorphAffine(SMALL, window=(2, 2, 2))
    out = made(*pair(generator, (19, 16, 23), batch=2))
    assert torch.equal(out, torch.eye(3, 4).expand(2, 3, 4))
    out[:, 0].sum().backward()
    assert made.head.weight.grad.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert made(*pair(generator)).dtype == torch.float32


def test_affine_policies_agree(generator):
    images = pair(generator, batch=2)
    for reversible in (False, True):
        expected = None
        for memory in ("stored", "checkpoint", *(["reversible"] if reversible else [])):
            torch.manual_seed(0)
            made = TransMorphAffine(SMALL, window=(2, 2, 2), memory=memory, reversible=reversible)
            nn.init.normal_(made.head.weight)
            found = results(made, images)
            expected = expected or found
            for a, b in zip(found, expected, strict=True):
                assert (a - b).norm() <= 1e-10 * b.norm() + 1e-10


def test_affine_parameters():
    """Rotation vector, translation, logarithms of scales, shears; and composed, every map of positive determinant."""

    def one(index: int, value: float) -> torch.Tensor:
        parameters = torch.zeros(1, 12, dtype=torch.float64)
        parameters[0, index] = value
        return compose_affine(parameters)[0]

    c, s = torch.tensor(0.3).cos().double(), torch.tensor(0.3).sin().double()
    for axis in range(3):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = torch.eye(3, 4, dtype=torch.float64)
        turn[a, a] = turn[b, b] = c
        turn[b, a], turn[a, b] = s, -s
        assert torch.allclose(one(axis, 0.3), turn, atol=1e-6)
        shift = torch.eye(3, 4, dtype=torch.float64)
        shift[axis, 3] = 0.3
        assert torch.allclose(one(3 + axis, 0.3), shift)
        scale = torch.eye(3, 4, dtype=torch.float64)
        scale[axis, axis] = 2.0
        assert torch.allclose(one(6 + axis, torch.tensor(2.0).double().log()), scale)
        shear = torch.eye(3, 4, dtype=torch.float64)
        shear[(0, 0, 1)[axis], (1, 2, 2)[axis]] = 0.3
        assert torch.allclose(one(9 + axis, 0.3), shear)
    parameters = 0.3 * torch.arange(-6.0, 6.0, dtype=torch.float64)[None]
    jacobian = torch.autograd.functional.jacobian(lambda p: compose_affine(p).flatten(), parameters)
    assert torch.linalg.matrix_rank(jacobian.view(12, 12)) == 12


def test_affine_learns_a_rotation(generator):
    torch.manual_seed(0)
    fixed, moving = pair(generator, (16, 16, 16))
    target = compose_affine(torch.tensor([[0.2, -0.1, 0.3, 0.1, 0.0, -0.2, 0.1, 0.0, -0.1, 0.05, 0.0, 0.1]]))
    made = TransMorphAffine(SMALL, window=(2, 2, 2), drop_path=0.0)
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    for _ in range(40):
        loss = (made(fixed, moving) - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-3
