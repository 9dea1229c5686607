"""The fused sampler against the reference in float64: the extension, the CUDA text on the CPU, and a GPU."""

from __future__ import annotations

import pytest
import torch

from patchreg import ops
from patchreg.errors import BackendUnavailable, InputError, NoGradient
from patchreg.ops import cpu

pytestmark = pytest.mark.filterwarnings("ignore:.*in no fixed order on CUDA")
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN, so that an output that is not written whole shows."""
    previous = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])


@pytest.fixture
def extension():
    found = cpu.find_extension()
    if found is None:
        pytest.skip("patchreg was installed without its compiled CPU kernels")
    return found


def random_inputs(generator, image=(1, 1, 5, 6, 37), displacement=(1, 3, 5, 6, 37), affine=None, scale=None):
    """Tensors of the given shapes: positions all over the image and some voxels beyond it."""
    made = {"image": torch.rand(image, generator=generator)}
    if displacement is not None:
        made["displacement"] = 5 * torch.rand(displacement, generator=generator) - 2.5
    if affine is not None:
        made["affine"] = torch.eye(3, 4) + 0.1 * (torch.rand((*affine, 3, 4), generator=generator) - 0.5)
        made["affine"][..., 3] *= 20
    if scale is not None:
        made["scale"] = torch.eye(3) + 0.4 * (torch.rand((*scale, 3, 3), generator=generator) - 0.5)
    return made


def run(inputs, backend, dtypes, device, wanted=None, **options):
    """The value, and its gradients to the wanted inputs (all), for an upstream gradient that is no constant."""
    given = {k: v.to(device, dtypes.get(k, torch.float32)).detach() for k, v in inputs.items()}
    wanted = list(inputs) if wanted is None else wanted
    for name in wanted:
        given[name].requires_grad_()
    value = ops.warp(**given, backend=backend, **options)
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randint(-40, 90, value.shape, generator=generator) / 64  # the same in every dtype
    gradients = torch.autograd.grad(value, [given[n] for n in wanted], upstream.to(value)) if wanted else []
    return {k: t.detach().cpu() for k, t in zip(["value", *wanted], [value, *gradients], strict=True)}


def agrees(inputs, device, tolerances, dtypes=None, wanted=None, **options):
    dtypes = dtypes or {}
    rounded = {k: v.to(dtypes.get(k, torch.float32)).double() for k, v in inputs.items()}
    exact = run(rounded, "reference", dict.fromkeys(inputs, torch.float64), "cpu", wanted, **options)
    found = run(inputs, "native", dtypes, device, wanted, **options)
    for name, tensor in found.items():
        kind = tensor.dtype
        assert kind == dtypes.get("image" if name == "value" else name, torch.float32)
        allowed = tolerances.kernel_value if name == "value" else tolerances.kernel_gradient
        allowed = tolerances.half if kind in (torch.float16, torch.bfloat16) else allowed
        error, size = (tensor.double() - exact[name]).norm(), exact[name].norm()
        assert error <= allowed * size, f"{name}: {float(error / size)}"


CASES = {
    "displacement": {},
    "affine": {"displacement": None, "affine": ()},
    "all maps": {"affine": (), "scale": ()},
    "scale": {"scale": ()},
    "another lattice": {"image": (1, 2, 9, 4, 7), "affine": ()},
    "batch": {"image": (3, 2, 5, 6, 37), "displacement": (3, 3, 5, 6, 37), "affine": (3,), "scale": (3,)},
    "one image": {"displacement": (3, 3, 5, 6, 37), "affine": (3,)},
    "one displacement": {"image": (3, 2, 5, 6, 37), "affine": (3,), "scale": (1,)},
    "one affine": {"image": (2, 1, 5, 6, 37), "displacement": (2, 3, 5, 6, 37), "affine": (1,), "scale": (1,)},
    "many affines": {"affine": (3,), "scale": (3,)},
}


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("case", CASES)
def test_value_and_every_gradient(case, padding, kernel_device, generator, tolerances):
    agrees(random_inputs(generator, **CASES[case]), kernel_device, tolerances, padding=padding)


@pytest.mark.parametrize("wanted", [["image"], ["displacement"], ["affine"], ["scale"], ["displacement", "affine"], []])
@pytest.mark.parametrize("shared", [False, True])
def test_each_gradient_by_itself(wanted, shared, kernel_device, generator, tolerances):
    displacement = (1 if shared else 2, 3, 5, 6, 37)
    inputs = random_inputs(generator, (2, 1, 5, 6, 37), displacement, (2,), (2,))
    agrees(inputs, kernel_device, tolerances, wanted=wanted)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (2, 33, 3), (40, 1, 6), (9, 8, 67)])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_shapes(shape, padding, kernel_device, generator, tolerances):
    inputs = random_inputs(generator, (1, 2, *shape), (1, 3, *shape))
    inputs["displacement"] *= 0.4  # there must be something in sight
    agrees(inputs, kernel_device, tolerances, padding=padding)


@pytest.mark.parametrize("shape", [(65, 70, 63), (31, 37, 131), (150, 3, 200)])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_shapes_of_several_bricks_and_regions(shape, padding, extension, generator, tolerances):
    inputs = random_inputs(generator, (1, 1, *shape), (1, 3, *shape), ())
    agrees(inputs, "cpu", tolerances, padding=padding)


@pytest.mark.parametrize("scale", [0.5, -2, torch.eye(3) * 0.5])
def test_scale_may_be_a_number(scale, kernel_device, generator, tolerances):
    inputs = random_inputs(generator)
    inputs["image"] *= 4095
    scale = scale.to(kernel_device) if isinstance(scale, torch.Tensor) else scale
    agrees(inputs, kernel_device, tolerances, scale=scale)


def test_output_of_any_shape_without_a_displacement(kernel_device, generator, tolerances):
    agrees(random_inputs(generator, displacement=None, affine=()), kernel_device, tolerances, shape=(3, 8, 65))
    image = torch.rand((2, 1, 4, 5, 6), generator=generator).to(kernel_device)
    assert torch.equal(ops.warp(image, backend="native"), image)


def test_positions_keep_their_digits_far_along_an_axis(kernel_device, generator, tolerances):
    """A float32 position of 50000 would be off by up to 0.002 voxels."""
    inputs = random_inputs(generator, (1, 1, 3, 4, 50100), affine=())
    inputs["affine"] = torch.tensor([[1.0, 0, 0, 0.25], [0, 0.7, 0.2, -4], [0.01, 0.3, 1.3, 50020.7]]).double()
    agrees(inputs, kernel_device, tolerances, dtypes={"affine": torch.float64})
    inputs = random_inputs(generator, (1, 1, 2, 2, 20000), (1, 3, 2, 2, 20000))
    inputs["displacement"] *= 0.2
    agrees(inputs, kernel_device, tolerances, wanted=["displacement"])


@pytest.mark.parametrize(
    ("image", "displacement"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
    ],
)
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_half_precision_storage(image, displacement, padding, kernel_device, generator, tolerances):
    inputs = random_inputs(generator, (2, 1, 5, 6, 37), affine=())
    dtypes = {"image": image, "displacement": displacement}
    agrees(inputs, kernel_device, tolerances, dtypes=dtypes, padding=padding)


def test_identity_gives_every_bit_back(kernel_device, generator):
    image = torch.randn((1, 2, 6, 7, 70), generator=generator).to(kernel_device) * 1e4
    u = torch.zeros((1, 3, 6, 7, 70), device=kernel_device)
    for padding in ("zeros", "border"):
        for mode in ("linear", "nearest", "label"):
            found = ops.warp(
                image, u, torch.eye(3, 4, device=kernel_device), padding=padding, mode=mode, backend="native"
            )
            assert torch.equal(found, image)


def test_constant_image_pulls_nowhere(kernel_device, generator):
    u = (torch.rand((1, 3, 5, 6, 37), generator=generator) - 0.5).to(kernel_device).requires_grad_()
    image = torch.full((1, 1, 5, 6, 37), 4095.0, device=kernel_device)
    ops.warp(image, u, padding="border", backend="native").sum().backward()
    assert u.grad.abs().max() == 0


STRANGE = [torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 2.0**31, -(2.0**31), 2.0**63, 1e9, -1e9, 1e-45]


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("maps", [False, True])
def test_positions_that_are_no_places(padding, maps, kernel_device, generator):
    """Diverged displacements are safe, and NaN is not hidden. Guard pages watch in the emulation."""
    inputs = random_inputs(generator)
    u = inputs["displacement"] * 0.1
    flat = u.view(3, -1)  # of the same memory
    for axis in range(3):
        flat[axis, 40 * axis : 40 * axis + len(STRANGE)] = torch.tensor(STRANGE)
    options = {"affine": torch.eye(3, 4, device=kernel_device)} if maps else {}
    given = [t.clone().to(kernel_device).requires_grad_() for t in (inputs["image"], u)]
    value = ops.warp(*given, **options, padding=padding, backend="native")
    value.sum().backward()
    is_nan = u.isnan().any(dim=1, keepdim=True)
    assert torch.equal(value.isnan().cpu(), is_nan)
    assert torch.equal(given[1].grad.isnan().any(dim=1, keepdim=True).cpu(), is_nan)
    exact = ops.warp(*(t.detach().cpu().double() for t in given), padding=padding, backend="reference")
    assert torch.equal(exact.isnan(), is_nan)
    assert torch.allclose(value.detach().cpu()[~is_nan], exact.float()[~is_nan], atol=1e-5)
    for mode in ("nearest", "label"):
        labels = (1000 * inputs["image"]).to(kernel_device, torch.int32)
        found = ops.warp(labels, u.to(kernel_device), **options, padding=padding, mode=mode, backend="native")
        expected = ops.warp(labels.cpu(), u.double(), padding=padding, mode=mode, backend="reference")
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e300])
def test_affine_maps_that_are_no_maps(number, kernel_device):
    image = torch.rand(1, 1, 5, 6, 37, device=kernel_device).requires_grad_()
    affine = torch.eye(3, 4, dtype=torch.float64, device=kernel_device)
    affine[1, 2] = affine[2, 3] = number
    affine.requires_grad_()
    for padding in ("zeros", "border"):
        value = ops.warp(image, affine=affine, padding=padding, backend="native")
        torch.autograd.grad(value.sum(), (image, affine))


def test_what_no_voxel_sees_does_not_enter_the_sums(kernel_device, generator):
    """Threads beyond the end of the volume sample somewhere too, and find a NaN there."""
    image = torch.rand((1, 1, 5, 6, 37), generator=generator)
    image[:, :, 4] = torch.nan
    affine = torch.eye(3, 4) * 0.5 + 0.01
    affine = affine.to(kernel_device).requires_grad_()
    value = ops.warp(image.to(kernel_device), affine=affine, padding="border", backend="native")
    value.sum().backward()
    assert torch.isfinite(affine.grad).all()


def test_values_outside_an_image_of_nan_are_zero(kernel_device):
    """What lies outside is not read, so a NaN at the edge does not leak into it."""
    image = torch.full((1, 1, 4, 4, 40), torch.nan, device=kernel_device)
    u = torch.full((1, 3, 4, 4, 40), 50.0, device=kernel_device)
    assert ops.warp(image, u, backend="native").abs().max() == 0


def label_map(generator, dtype, shape=(2, 2, 6, 7, 37)):
    labels = torch.randint(0, 2 if dtype == torch.bool else 5, shape, generator=generator)
    if dtype.is_signed and dtype is not torch.bool:
        labels -= 2
    return (labels * (60000 if dtype in (torch.int32, torch.int64, torch.float32) else 1)).to(dtype)


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["nearest", "label"])
def test_labels_of_every_dtype(dtype, mode, kernel_device, generator):
    labels = label_map(generator, dtype)
    u = 6 * torch.rand((2, 3, 6, 7, 37), generator=generator) - 3
    for padding in ("zeros", "border"):
        expected = ops.warp(labels.double(), u.double(), padding=padding, mode=mode, backend="reference")
        found = ops.warp(
            labels.to(kernel_device), u.to(kernel_device), padding=padding, mode=mode, backend="native"
        )  # fmt: skip
        assert found.dtype == dtype
        assert torch.equal(found.cpu().double(), expected)


@pytest.mark.parametrize("axis", [2, 3, 4])
def test_labels_in_large_regions(axis, kernel_device, generator):
    """Whole rows of voxels see one label, or one on this side and another on that."""
    labels = (torch.arange(20) // 4).view([-1 if d == axis else 1 for d in range(5)]).expand(1, 1, 20, 20, 20)
    u = 0.5 + 0.5 * torch.rand((1, 3, 20, 20, 20), generator=generator)
    expected = ops.warp(labels, u.double(), padding="border", mode="label", backend="reference")
    found = ops.warp(labels.to(kernel_device), u.to(kernel_device), padding="border", mode="label", backend="native")
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("mode", ["nearest", "label"])
def test_ties_are_broken_as_by_the_reference(mode, kernel_device, generator):
    """Halves and quarters of voxels: nearest rounds to even, and of equal votes the first neighbour's counts."""
    labels = torch.randint(0, 4, (1, 1, 6, 7, 37), generator=generator, dtype=torch.int16)
    u = torch.randint(-6, 7, (1, 3, 6, 7, 37), generator=generator) / 4
    for padding in ("zeros", "border"):
        expected = ops.warp(labels, u.double(), padding=padding, mode=mode, backend="reference")
        found = ops.warp(labels.to(kernel_device), u.to(kernel_device), padding=padding, mode=mode, backend="native")
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float_labels_with_two_zeros_and_nan(dtype, kernel_device, generator):
    """Both zeros are one label, and a NaN, equal to nothing, has no vote."""
    values = torch.tensor([0.0, -0.0, 1.0, torch.nan], dtype=dtype)
    labels = values[torch.randint(0, 4, (1, 1, 6, 7, 37), generator=generator)]
    u = 2 * torch.rand((1, 3, 6, 7, 37), generator=generator) - 1
    expected = ops.warp(labels.double(), u.double(), padding="border", mode="label", backend="reference")
    found = ops.warp(labels.to(kernel_device), u.to(kernel_device), padding="border", mode="label", backend="native")
    assert torch.equal(found.cpu().double().nan_to_num(nan=7), expected.nan_to_num(nan=7))


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nearest_has_a_gradient_to_the_image(padding, dtype, kernel_device, generator, tolerances):
    inputs = random_inputs(generator, (2, 2, 5, 6, 37), affine=(1,))
    agrees(inputs, kernel_device, tolerances, {"image": dtype}, ["image"], padding=padding, mode="nearest")


def test_gradients_that_do_not_exist_are_refused(kernel_device):
    image = torch.rand(1, 1, 4, 4, 4, device=kernel_device)
    affine = torch.eye(3, 4, device=kernel_device).requires_grad_()
    for mode in ("nearest", "label"):
        with pytest.raises(NoGradient, match="use mode='linear'"):
            ops.warp(image, affine=affine, mode=mode, backend="native")
    with pytest.raises(NoGradient, match="'label' has no gradient to the image"):
        ops.warp(image.requires_grad_(), mode="label")
    with torch.no_grad():
        ops.warp(image, affine=affine, mode="label", backend="native")


@pytest.mark.parametrize("requires_grad", [False, True])
def test_operators_are_registered_right(requires_grad, kernel_device, generator):
    made = random_inputs(generator, (2, 2, 4, 5, 6), (1, 3, 3, 4, 5), (2,), (1,))
    image, u, affine, scale = (t.to(kernel_device).requires_grad_(requires_grad) for t in made.values())
    for maps in ((u, affine, scale), (None, affine, None), (u, None, None)):
        for border in (False, True):
            arguments = (image, *maps, 1.0, (3, 4, 5), "linear", border, False)
            torch.library.opcheck(torch.ops.patchreg.warp.default, arguments)
    arguments = (image, None, affine.detach(), None, 1.0, (3, 4, 5), "nearest", True, False)
    torch.library.opcheck(torch.ops.patchreg.warp.default, arguments)
    arguments = (made["displacement"].to(kernel_device), u, None, None, 0.5, (3, 4, 5), "linear", True, True)
    torch.library.opcheck(torch.ops.patchreg.warp.default, arguments)
    upstream = torch.rand((2, 2, 3, 4, 5), generator=generator).to(kernel_device)
    image, u, affine, scale = (t.detach() for t in (image, u, affine, scale))
    for seen, wanted in ((image, [True] * 4), (None, [True, False, False, False]), (image, [False, True, False, True])):
        arguments = (upstream, seen, image.shape, image.dtype, u, affine, scale, 1.0, "linear", True, False, wanted)
        torch.library.opcheck(torch.ops.patchreg.warp_backward.default, arguments)


@pytest.mark.parametrize(
    "options", [{}, {"scale": 0.5, "padding": "border"}, {"affine": torch.eye(3, 4) + 0.01}, {"shape": None}]
)
def test_compiles_in_one_graph(options, extension, generator):
    made = random_inputs(generator)
    image, u = (t.requires_grad_() for t in made.values())

    def loss(i, d):
        return ops.warp(i, d, **options).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(f(image, u), (image, u)) for f in (loss, compiled))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_numbers_that_change_do_not_break_the_graph(extension, generator):
    image, u = random_inputs(generator).values()
    compiled = torch.compile(lambda i, d, s: ops.warp(i, d, scale=s), fullgraph=True, backend="aot_eager")
    for scale in (0.5, 0.25, 2.0):
        assert torch.equal(compiled(image, u, scale), ops.warp(image, u, scale=scale))


@pytest.mark.parametrize("mode", ["nearest", "label"])
def test_label_modes_compile_in_one_graph(mode, extension, generator):
    labels, u = label_map(generator, torch.int16, (1, 1, 5, 6, 37)), random_inputs(generator)["displacement"]
    compiled = torch.compile(lambda i, d: ops.warp(i, d, mode=mode), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(labels, u), ops.warp(labels, u, mode=mode, backend="native"))


def test_tensors_that_are_not_contiguous(kernel_device, generator):
    made = random_inputs(generator, (2, 1, 9, 6, 5), (2, 3, 9, 6, 5), (2,), (2,))

    def both(turn):
        given = [turn(t.to(kernel_device)).detach().requires_grad_() for t in made.values()]
        value = ops.warp(*given, backend="native")
        return [value, *torch.autograd.grad(value, given, torch.ones_like(value))]

    strided = both(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1))
    for a, b in zip(strided, both(lambda t: t.contiguous()), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # float atomics


def test_a_second_derivative_is_refused(kernel_device, generator):
    image, u = (t.to(kernel_device).requires_grad_() for t in random_inputs(generator).values())
    (gradient,) = torch.autograd.grad(ops.warp(image, u, backend="native").square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_only_what_the_gradient_depends_on_is_kept(kernel_device, generator):
    """The gradient to the image alone needs no image."""
    image, u = (t.to(kernel_device) for t in random_inputs(generator, (1, 2, 5, 6, 37)).values())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        ops.warp(image.clone().requires_grad_(), u, backend="native")
    assert kept == [u.shape]


def test_the_number_of_threads_changes_nothing(extension, generator):
    inputs = random_inputs(generator, (2, 1, 40, 50, 37), (1, 3, 40, 50, 37), (2,), (1,))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 9):
            torch.set_num_threads(threads)
            found.append(run(inputs, "native", {}, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(name, extension, generator, tolerances):
    best = extension.instruction_set()
    try:
        extension.use_instruction_set(name)
    except ValueError:
        pytest.skip(f"this processor does not run {name}")
    try:
        labels, u = label_map(generator, torch.int16), 6 * torch.rand((2, 3, 6, 7, 37), generator=generator) - 3
        for padding in ("zeros", "border"):
            inputs = random_inputs(generator, (1, 2, 9, 8, 131), (1, 3, 9, 8, 131), (), ())
            agrees(inputs, "cpu", tolerances, padding=padding)
            agrees(inputs, "cpu", tolerances, {"image": torch.float16, "displacement": torch.bfloat16}, padding=padding)
            for mode in ("nearest", "label"):
                found = ops.warp(labels, u, padding=padding, mode=mode, backend="native")
                expected = ops.warp(labels, u.double(), padding=padding, mode=mode, backend="reference")
                assert torch.equal(found, expected)
    finally:
        extension.use_instruction_set(best)


@pytest.mark.parametrize("device", ["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_sums_in_no_fixed_order_are_told_where_they_matter(device, request, generator):
    if device == "emulated":
        request.getfixturevalue("emulated_cuda")
    elif not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    image, u = random_inputs(generator).values()
    image = image.to("cuda" if device == "gpu" else "cpu").requires_grad_()
    value = ops.warp(image, u.to(image.device), backend="native")
    with pytest.warns(UserWarning, match="in no fixed order"):
        value.sum().backward(retain_graph=True)
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match="in no fixed order"):
        value.sum().backward(retain_graph=True)
    torch.use_deterministic_algorithms(False)
    value.sum().backward()


def test_images_of_more_than_2_to_the_31_voxels(extension):
    """Only the pages that are touched take memory."""
    size = 1300
    image = torch.zeros((1, 1, size, size, size), dtype=torch.uint8)
    image[0, 0, -2:, -2:, -2:] = torch.arange(8, dtype=torch.uint8).view(2, 2, 2)
    affine = torch.eye(3, 4, dtype=torch.float64)
    affine[:, 3] = size - 2
    for mode in ("nearest", "label"):
        found = ops.warp(image, affine=affine, shape=(2, 2, 2), mode=mode, backend="native")
        assert found.flatten().tolist() == list(range(8))
    large = torch.zeros((1, 1, size, size, size), dtype=torch.float16)
    large[0, 0, -1, -1, -1] = 8
    affine[:, 3] = size - 1.5
    assert ops.warp(large, affine=affine, shape=(1, 1, 1), backend="native").item() == 1


def test_what_no_kernel_takes_is_told(extension):
    image, u = torch.rand(1, 1, 4, 4, 4), torch.zeros(1, 3, 4, 4, 4)
    with pytest.raises(BackendUnavailable, match="not torch.float64"):
        ops.warp(image.double(), u, backend="native")
    with pytest.raises(BackendUnavailable, match="not torch.float64"):
        ops.warp(image.double().requires_grad_(), u, mode="nearest", backend="native")
    with pytest.raises(BackendUnavailable, match="not torch.complex128"):
        ops.warp(image.to(torch.complex128), u, mode="nearest", backend="native")
    with pytest.raises(BackendUnavailable, match="not for meta"):
        ops.warp(image.to("meta"), u.to("meta"), backend="native")
    with pytest.raises(InputError, match="three positive numbers"):
        ops.warp(image, shape=(4, 0, 4))
    with pytest.raises(InputError, match="image is empty"):
        ops.warp(torch.zeros(1, 1, 4, 0, 4, dtype=torch.int32), u, mode="label")
    with pytest.raises(RuntimeError, match=r"2\^23 voxels or more"):
        ops.warp(torch.zeros(1, 1, 1, 1, 2**23, dtype=torch.float16), u, backend="native")


def test_without_the_extension_the_reference_runs(generator, monkeypatch):
    image, u = random_inputs(generator).values()
    expected = ops.warp(image, u, backend="reference")
    monkeypatch.setattr(cpu, "find_extension", lambda: None)
    assert torch.equal(ops.warp(image, u), expected)
    assert ops.warp(image.int(), u, mode="label").dtype == torch.int32
    with pytest.raises(BackendUnavailable, match="no compiled CPU kernels"):
        ops.warp(image, u, backend="native")
