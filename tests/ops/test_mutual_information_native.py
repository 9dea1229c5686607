"""The fused kernels against the reference in float64: the extension, the CUDA text on the CPU, and a GPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from patchreg import ops
from patchreg.errors import BackendUnavailable, InputError, NoGradient
from patchreg.memory import LivePeak
from patchreg.ops import cpu
from patchreg.ops.mutual_information import cuda, native
from patchreg.ops.windows import gaussian_smooth

SMALL = (13, 10, 19)


def noise(generator, shape):
    return [torch.rand(shape, generator=generator) for _ in range(2)]


def brain_like(generator, shape):
    """Two contrasts of one anatomy, with a background of exact zeros in which they agree."""
    texture = [gaussian_smooth(torch.rand(shape, generator=generator), (1.5,) * 3) for _ in range(2)]
    images = [texture[0], (texture[0] + 0.5 * texture[1]) ** 2]
    for image in images:
        image[..., : shape[2] // 3, :, :] = 0
        image[..., :, -shape[3] // 4 :, :] = 0
    return images


def signed(generator, shape):
    return [200 * image - 1000 for image in brain_like(generator, shape)]


KINDS = {
    "noise": noise,
    "brain": brain_like,
    "raw intensities": lambda g, s: [(4095 * image).round() for image in brain_like(g, s)],
    "below zero": signed,
}


def run(I, J, backend, dtype, device, mask=None, **options):
    """The value, and its gradients to both images."""
    i, j = (x.to(device, dtype).detach().requires_grad_() for x in (I, J))
    mask = None if mask is None else mask.to(device)
    value = ops.mutual_information(i, j, mask=mask, backend=backend, **options)
    (3 * value).backward()
    return [t.detach().double().cpu() for t in (value, i.grad, j.grad)]


def agrees(I, J, device, tolerances, dtype=torch.float32, **options):
    exact = run(I.to(dtype), J.to(dtype), "reference", torch.float64, "cpu", **options)
    found = run(I, J, "native", dtype, device, **options)
    half = dtype != torch.float32
    assert abs(found[0] - exact[0]) <= tolerances.kernel_value * abs(exact[0])
    allowed = tolerances.half if half else tolerances.kernel_gradient
    for name, grad, exact_grad in zip(("fixed", "moving"), found[1:], exact[1:], strict=True):
        assert torch.isfinite(grad).all()
        assert (grad - exact_grad).norm() <= allowed * exact_grad.norm(), f"gradient to {name}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [8, 16, 32, 64, 128])
def test_bspline(kind, bins, kernel_device, generator, tolerances):
    agrees(*KINDS[kind](generator, (1, 1, *SMALL)), kernel_device, tolerances, bins=bins)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bins", [8, 32, 128])
def test_gaussian(kind, bins, kernel_device, generator, tolerances):
    agrees(*KINDS[kind](generator, (1, 1, *SMALL)), kernel_device, tolerances, bins=bins, window="gaussian")


@pytest.mark.parametrize("window", ["bspline", "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_normalized(kind, window, kernel_device, generator, tolerances):
    agrees(*KINDS[kind](generator, (1, 1, *SMALL)), kernel_device, tolerances, window=window, normalized=True)


@pytest.mark.parametrize("window", ["bspline", "gaussian"])
def test_more_bins_than_shared_memory_holds(window, kernel_device, generator, tolerances):
    agrees(*noise(generator, (1, 2, 11, 12, 13)), kernel_device, tolerances, bins=200, window=window)


@pytest.mark.parametrize("shape", [(1, 5, 7), (1, 1, 9), (2, 33, 3), (40, 1, 6), (9, 8, 67)])
def test_shapes_batch_and_channels(shape, kernel_device, generator, tolerances):
    agrees(*noise(generator, (2, 3, *shape)), kernel_device, tolerances, bins=16)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(65, 70, 63), (31, 37, 29)])
def test_shapes_of_several_parts(shape, kernel_device, generator, tolerances):
    agrees(*brain_like(generator, (1, 1, *shape)), kernel_device, tolerances)


@pytest.mark.parametrize("window", ["bspline", "gaussian"])
@pytest.mark.parametrize("of_batch", [True, False])
def test_masks_with_holes_are_weights(of_batch, window, kernel_device, generator, tolerances):
    I, J = brain_like(generator, (2, 2, *SMALL))
    mask = 100 * torch.rand((2 if of_batch else 1, 1, *SMALL), generator=generator)
    mask[:, :, 3:6, 2:8, 5:15] = 0
    agrees(I, J, kernel_device, tolerances, mask=mask, window=window)
    agrees(I, J, kernel_device, tolerances, mask=mask > 30, window=window)


@pytest.mark.parametrize("window", ["bspline", "gaussian"])
def test_ranges_given(window, kernel_device, generator, tolerances):
    I, J = noise(generator, (1, 2, *SMALL))
    agrees(I, J, kernel_device, tolerances, fixed_range=(0.1, 0.55), moving_range=(0.2, 0.9), window=window)
    agrees(I, J, kernel_device, tolerances, moving_range=(-0.7, 2.1), window=window)


def test_a_narrow_range_far_from_zero(kernel_device, generator, tolerances):
    """A place among 128 bins is found to more digits than float32 has."""
    I, J = (x.round(decimals=3) for x in noise(generator, (1, 1, *SMALL)))
    options = {"bins": 128, "fixed_range": (99.9, 101.1), "moving_range": (-55.3, -53.7)}
    agrees(I + 100, J - 55, kernel_device, tolerances, **options)


def test_gradient_ends_outside_the_range(kernel_device):
    I = torch.linspace(0, 1, 101, device=kernel_device).reshape(1, 1, 1, 1, -1).requires_grad_()
    ops.mutual_information(I, (I * 7 % 1).detach(), 16, fixed_range=(0.25, 0.75), backend="native").backward()
    inside = (I >= 0.25) & (I <= 0.75)
    assert (I.grad[~inside] == 0).all()
    assert (I.grad[inside] != 0).all()


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("value", [0.0, 7.0, -4095.0])
def test_one_constant_image_has_no_information_and_no_slope(value, normalized, kernel_device, generator):
    I = torch.full((1, 1, *SMALL), value, device=kernel_device, requires_grad=True)
    J = torch.rand((1, 1, *SMALL), generator=generator).to(kernel_device).requires_grad_()
    for backend in ("native", "reference"):
        I.grad = J.grad = None
        found = ops.mutual_information(I, J, normalized=normalized, backend=backend)
        found.backward()
        assert abs(float(found.detach()) - normalized) < 1e-5
        assert (I.grad == 0).all()
        assert J.grad.norm() < 1e-5


def test_both_images_constant(kernel_device):
    I = torch.full((1, 1, *SMALL), 3.0, device=kernel_device, requires_grad=True)
    value = ops.mutual_information(I, torch.zeros_like(I), backend="native")
    value.backward()
    assert abs(float(value.detach())) < 1e-6
    assert (I.grad == 0).all()


@pytest.mark.parametrize("window", ["bspline", "gaussian"])
@pytest.mark.parametrize("solid", [True, False])
def test_counts_beyond_32_bits(solid, window, kernel_device, generator, tolerances):
    """So many equal voxels, alone in their warps or not, that sums in shared memory overflow and are carried on."""
    I, J = noise(generator, (1, 1, 20, 30, 31))
    background = torch.rand(I.shape, generator=generator) < 0.85
    if solid:
        background[:] = False
        background[..., :17, :, :] = True
    I[background] = J[background] = 0.5
    agrees(I, J, kernel_device, tolerances, bins=64, window=window)


@pytest.mark.parametrize("window", ["bspline", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, window, kernel_device, generator, tolerances):
    """Only storage is rounded: the value has the digits of float32, the gradients those of their dtype.

    Small gradients vanish in float16, as they always do there: those to raw intensities need a scaled loss.
    """
    I, J = brain_like(generator, (2, 1, *SMALL))
    agrees(I, J, kernel_device, tolerances, dtype=dtype, window=window, normalized=True)
    value = ops.mutual_information(I.to(kernel_device, dtype), J.to(kernel_device), backend="native")
    assert value.dtype == torch.float32


@pytest.mark.parametrize("window", ["bspline", "gaussian"])
def test_same_bits_for_any_number_of_threads(window, generator):
    if cpu.find_extension() is None:
        pytest.skip("patchreg was installed without its compiled CPU kernels")
    I, J = brain_like(generator, (1, 2, 65, 70, 63))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(I, J, "native", torch.float32, "cpu", window=window))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_same_bits_on_any_number_of_multiprocessors(emulated_cuda, generator, monkeypatch):
    I, J = brain_like(generator, (1, 1, 20, 30, 31))
    found = []
    for count in (1, 2, 7):
        monkeypatch.setattr(cuda, "_multiprocessors", lambda device, count=count: count)
        found.append(run(I, J, "native", torch.float32, "cpu"))
    assert len({each.grid for each in emulated_cuda.launches if "add_voxels" in each.entry}) > 1
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa, generator, tolerances):
    extension = cpu.find_extension()
    if extension is None:
        pytest.skip("patchreg was installed without its compiled CPU kernels")
    before = extension.instruction_set()
    try:
        extension.use_instruction_set(isa)
    except ValueError:
        pytest.skip(f"this processor does not run {isa}")
    try:
        for window in ("bspline", "gaussian"):
            agrees(*brain_like(generator, (1, 1, *SMALL)), "cpu", tolerances, window=window)
    finally:
        extension.use_instruction_set(before)


def test_not_a_number_stays_one(kernel_device, generator):
    I, J = (x.to(kernel_device) for x in noise(generator, (1, 1, *SMALL)))
    I[0, 0, 5, 5, 5] = torch.nan
    for options in ({}, {"fixed_range": (0.0, 1.0)}):
        assert torch.isnan(ops.mutual_information(I, J, backend="native", **options))


def test_layouts_of_memory(kernel_device, generator):
    I, J = (x.to(kernel_device) for x in noise(generator, (2, 2, *SMALL)))
    expected = ops.mutual_information(I, J, backend="native")
    moved = I.permute(4, 2, 0, 1, 3).contiguous().permute(2, 3, 1, 4, 0)
    assert not moved.is_contiguous()
    padded = torch.nn.functional.pad(J, (1, 2))[..., 1:-2]
    assert torch.equal(ops.mutual_information(moved, padded, backend="native"), expected)


def test_gradient_to_one_image(kernel_device, generator):
    I, J = (x.to(kernel_device) for x in noise(generator, (1, 1, *SMALL)))
    both = [x.clone().requires_grad_() for x in (I, J)]
    ops.mutual_information(*both, backend="native").backward()
    for k in range(2):
        images = [I.clone(), J.clone()]
        images[k].requires_grad_()
        ops.mutual_information(*images, backend="native").backward()
        assert torch.equal(images[k].grad, both[k].grad)
        assert images[1 - k].grad is None


def test_keeps_nothing_of_volume_size(kernel_device, generator):
    I, J = (x.to(kernel_device) for x in noise(generator, (1, 1, 32, 32, 32)))
    J.requires_grad_()
    with LivePeak() as forward:
        value = ops.mutual_information(I, J, backend="native")
    assert forward.peak < 64 * 32 * 32
    with LivePeak() as backward:
        (grad,) = torch.autograd.grad(value, J)
    assert backward.peak < grad.nbytes + 64 * 32 * 32


def test_second_derivative_is_refused(kernel_device, generator):
    I, J = (x.to(kernel_device).requires_grad_() for x in noise(generator, (1, 1, *SMALL)))
    value = ops.mutual_information(I, J, backend="native")
    (grad,) = torch.autograd.grad(value, I, create_graph=True)
    with pytest.raises(RuntimeError, match="mutual_information_gradients"):
        grad.square().sum().backward()


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, kernel_device, generator):
    I, J = (x.to(kernel_device).requires_grad_() for x in noise(generator, (2, 2, 5, 6, 7)))
    weight = torch.rand((1, 1, 5, 6, 7), generator=generator).to(kernel_device) if masked else None
    ends = [0.0, 1.0, torch.nan, torch.nan]
    torch.library.opcheck(native.joint_information, (I, J, weight, 16, False, True, ends))
    _, slopes, ranges = native.joint_information(I, J, weight, 16, False, True, ends)
    upstream = torch.rand((2, 2), generator=generator).to(kernel_device)
    I, J = I.detach(), J.detach()
    for wanted in ((True, True), (False, True)):
        torch.library.opcheck(native.gradients, (upstream, slopes, ranges, I, J, weight, False, *wanted))


def test_compiles_whole(kernel_device, generator):
    I, J = (x.to(kernel_device) for x in noise(generator, (1, 2, *SMALL)))
    mask = (torch.rand((1, 1, *SMALL), generator=generator) > 0.5).to(kernel_device)

    def function(i, j, m):
        return ops.mutual_information(i, j, mask=m, normalized=True, backend="native")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = []
    for f in (function, compiled):
        i, j = (x.clone().requires_grad_() for x in (I, J))
        value = f(i, j, mask)
        value.backward()
        found.append((value.detach(), i.grad, j.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("normalized", [False, True])
def test_empty_mask_in_a_graph_says_nothing_and_pulls_nowhere(normalized, backend, kernel_device, generator):
    """Where the content of a mask cannot be looked at, an empty one gives the value of independent images."""

    def function(i, j, m):
        return ops.mutual_information(i, j, mask=m, normalized=normalized, backend=backend)

    I, J = (x.to(kernel_device).requires_grad_() for x in noise(generator, (1, 1, *SMALL)))
    value = torch.compile(function, fullgraph=True, backend="aot_eager")(I, J, torch.zeros_like(I))
    value.backward()
    assert float(value.detach()) == normalized
    assert (I.grad == 0).all()
    assert (J.grad == 0).all()


def test_fake_tensors(kernel_device):
    with FakeTensorMode():
        I, J = (torch.rand((2, 1, *SMALL), requires_grad=True) for _ in range(2))
        value = ops.mutual_information(I, J, mask=torch.ones(2, 1, *SMALL), backend="native")
        value.backward()
    assert value.shape == ()
    assert I.grad.shape == J.grad.shape == I.shape


def test_autocast(kernel_device, generator):
    I, J = (x.to(kernel_device) for x in noise(generator, (1, 1, *SMALL)))
    expected = ops.mutual_information(I, J, backend="native")
    with torch.autocast(kernel_device.type, dtype=torch.bfloat16):
        assert torch.equal(ops.mutual_information(I, J, backend="native"), expected)


@pytest.mark.gpu
def test_cuda_graph(generator):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    I, J = (x.cuda() for x in brain_like(generator, (1, 2, *SMALL)))
    mask = torch.ones(1, 1, *SMALL, device="cuda")
    static = [torch.rand_like(x).requires_grad_() for x in (I, J)]

    def step():
        value = ops.mutual_information(*static, mask=mask, fixed_range=(0.0, 1.0), backend="native")
        return value, *torch.autograd.grad(value, static)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        for place, image in zip(static, (I, J), strict=True):
            place.copy_(image)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"bins": 7}, InputError, "at least 8 and at most 1024"),
        ({"bins": 1025}, InputError, "at least 8 and at most 1024"),
        ({"mask": torch.zeros(1, 1, 4, 4, 4)}, InputError, "mask is empty"),
        (
            {"mask": torch.full((1, 1, 4, 4, 4), -1.0).index_fill(4, torch.tensor([0]), 1.0)},
            InputError,
            "negative, got -1",
        ),
        ({"mask": torch.ones(1, 1, 4, 4, 4, requires_grad=True)}, NoGradient, "no gradient to the mask"),
        ({"moving": torch.zeros(1, 1, 4, 4, 5)}, InputError, "one shape"),
        ({"moving": torch.zeros(1, 1, 4, 4, 4, dtype=torch.int32)}, InputError, "floating"),
        ({"moving": torch.zeros(1, 1, 4, 4, 4, dtype=torch.float64)}, BackendUnavailable, "not torch.float64"),
        ({"moving": torch.zeros(1, 1, 4, 4, 4, device="meta")}, InputError, "on meta"),
    ],
)
def test_bad_input_is_told_by_name(change, error, says, kernel_device):
    arguments = {"fixed": torch.rand(1, 1, 4, 4, 4), "moving": torch.rand(1, 1, 4, 4, 4), **change}
    with pytest.raises(error, match=says):
        ops.mutual_information(**arguments, backend="native")
