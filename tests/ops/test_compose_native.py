"""Fused composition, and scaling and squaring, against the reference in float64: extension, emulated CUDA, and GPU."""

from __future__ import annotations

import math

import pytest
import torch

from patchreg import ops
from patchreg.errors import BackendUnavailable, InputError
from patchreg.ops import cpu

pytestmark = pytest.mark.filterwarnings("ignore:.*in no fixed order on CUDA")

SHAPE = (5, 6, 37)


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


def field(generator, batch=1, shape=SHAPE, size=4.0):
    return size * (torch.rand((batch, 3, *shape), generator=generator) - 0.5)


def field_in(dtype, generator):
    """Rounded to ``dtype``, but nowhere to a voxel's centre, where the derivative jumps."""
    rounded = field(generator).to(dtype)
    return torch.where(rounded == rounded.round(), 0.3, rounded)


def run(operation, inputs, backend, dtypes, device, **options):
    """The value, and its gradients to all inputs, for an upstream gradient that is no constant."""
    given = [t.to(device, dtype).detach().requires_grad_() for t, dtype in zip(inputs, dtypes, strict=True)]
    value = operation(*given, backend=backend, **options)
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randint(-40, 90, value.shape, generator=generator) / 64  # the same in every dtype
    return [t.detach().cpu() for t in (value, *torch.autograd.grad(value, given, upstream.to(value)))]


def agrees(operation, inputs, device, tolerances, dtypes=None, **options):
    dtypes = dtypes or [torch.float32] * len(inputs)
    rounded = [t.to(dtype) for t, dtype in zip(inputs, dtypes, strict=True)]
    exact = run(operation, rounded, "reference", [torch.float64] * len(inputs), "cpu", **options)
    found = run(operation, inputs, "native", dtypes, device, **options)
    for index, (tensor, expected) in enumerate(zip(found, exact, strict=True)):
        allowed = tolerances.kernel_gradient if index else tolerances.kernel_value
        allowed = allowed if tensor.dtype in (torch.float32, torch.float64) else tolerances.half
        error, size = (tensor.double() - expected).norm(), expected.norm()
        assert error <= allowed * size, f"number {index}: {float(error / size)}"
    return found


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("batches", [(1, 1), (2, 2), (3, 1), (1, 3)])
def test_compose(batches, padding, kernel_device, generator, tolerances):
    inputs = [field(generator, batch) for batch in batches]
    found = agrees(ops.compose, inputs, kernel_device, tolerances, padding=padding)
    assert found[0].shape == (max(batches), 3, *SHAPE)


@pytest.mark.parametrize("scale", [None, 0.5, (), (2,)])
def test_compose_on_another_lattice(scale, kernel_device, generator, tolerances):
    u, v = field(generator, 2, (9, 4, 7)), field(generator, 1)
    affine = torch.eye(3, 4) * torch.tensor([[1.7], [0.6], [0.15]]) + 0.1
    inputs = [u, v, affine]
    if isinstance(scale, tuple):
        inputs.append(torch.eye(3) + 0.3 * torch.rand((*scale, 3, 3), generator=generator))
        agrees(ops.compose, inputs, kernel_device, tolerances)
    else:
        agrees(ops.compose, inputs, kernel_device, tolerances, scale=scale)


@pytest.mark.parametrize(
    ("u", "v", "result"),
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_composing_half_precision(u, v, result, kernel_device, generator, tolerances):
    inputs = [field_in(u, generator), field_in(v, generator)]
    found = agrees(ops.compose, inputs, kernel_device, tolerances, [u, v])
    assert [t.dtype for t in found] == [result, u, v]


def test_composing_a_field_with_itself(kernel_device, generator):
    """Both gradients reach the one tensor."""
    u = field(generator).to(kernel_device)
    together, first, second = (u.clone().requires_grad_() for _ in range(3))
    ops.compose(together, together, backend="native").square().sum().backward()
    ops.compose(first, second, backend="native").square().sum().backward()
    assert torch.allclose(together.grad, first.grad + second.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("memory", ["recompute", "stored"])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_integrate(steps, memory, padding, kernel_device, generator, tolerances):
    found = agrees(
        ops.integrate, [field(generator, 2)], kernel_device, tolerances, steps=steps, memory=memory, padding=padding
    )
    assert found[0].shape == (2, 3, *SHAPE)


@pytest.mark.parametrize("steps", [3, 4, 5, 6, 8, 13])
def test_checkpoints_change_nothing(steps, kernel_device, generator):
    v = field(generator, shape=(3, 4, 5)).to(kernel_device)
    gradients = []
    for memory in ("recompute", "stored"):
        own = v.clone().requires_grad_()
        ops.integrate(own, steps, memory=memory, backend="native").square().sum().backward()
        gradients.append(own.grad)
    assert torch.allclose(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (3, 1, 130)])
def test_shapes(shape, kernel_device, generator, tolerances):
    agrees(ops.integrate, [field(generator, shape=shape, size=2.0)], kernel_device, tolerances)
    agrees(ops.compose, [field(generator, shape=shape, size=0.5) for _ in range(2)], kernel_device, tolerances)


@pytest.mark.parametrize("shape", [(33, 47, 65), (70, 5, 131)])
def test_shapes_of_several_bricks_and_regions(shape, extension, generator, tolerances):
    agrees(ops.integrate, [field(generator, shape=shape)], "cpu", tolerances)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory", ["recompute", "stored"])
@pytest.mark.parametrize("steps", [1, 4])
def test_half_precision_is_integrated_in_float32(steps, memory, dtype, kernel_device, generator, tolerances):
    inputs = [field_in(dtype, generator)]
    value, gradient = agrees(
        ops.integrate, inputs, kernel_device, tolerances, dtypes=[dtype], steps=steps, memory=memory
    )
    assert value.dtype == gradient.dtype == dtype
    exact = ops.integrate(inputs[0].to(dtype).double(), steps)
    assert (value.double() - exact.to(dtype).double()).norm() <= 0.1 * torch.finfo(dtype).eps * exact.norm()


def test_a_velocity_that_diverged(kernel_device, generator):
    for number in (torch.nan, torch.inf, -3e38):
        v = field(generator)
        v[0, 1, 2, 3, 4:9] = number
        own = v.to(kernel_device).requires_grad_()
        value = ops.integrate(own, backend="native")
        value.sum().backward()
        if math.isnan(number):
            assert value[0, 1, 2, 3, 4:9].isnan().all()
            assert own.grad[0, :, 2, 3, 4:9].isnan().any(dim=0).all()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_operators_are_registered_right(requires_grad, stored, kernel_device, generator):
    v = field(generator, 2, (3, 4, 5)).to(kernel_device).requires_grad_(requires_grad)
    for steps in (0, 1, 3):
        torch.library.opcheck(torch.ops.patchreg.integrate.default, (v, steps, True, stored))
        fields = torch.ops.patchreg.integrate(v.detach(), steps, True, stored)[1]
        upstream = torch.ones_like(v)
        arguments = (upstream, v.detach(), fields, steps, True)
        torch.library.opcheck(torch.ops.patchreg.integrate_backward.default, arguments)


@pytest.mark.parametrize("memory", ["recompute", "stored"])
def test_compiles_in_one_graph(memory, extension, generator):
    v = field(generator).requires_grad_()
    u = field(generator).requires_grad_()

    def loss(a, b):
        return ops.compose(a, ops.integrate(b, 4, memory=memory), scale=0.5).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(f(u, v), (u, v)) for f in (loss, compiled))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "operation", [lambda v: ops.compose(v, v, backend="native"), lambda v: ops.integrate(v, backend="native")]
)
def test_a_second_derivative_is_refused(operation, kernel_device, generator):
    v = field(generator).to(kernel_device).requires_grad_()
    (gradient,) = torch.autograd.grad(operation(v).square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize(("memory", "fields"), [("recompute", 0), ("stored", 6)])
def test_what_is_kept_for_the_backward_pass(memory, fields, kernel_device, generator):
    v = field(generator).to(kernel_device).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.integrate(v, 7, memory=memory, backend="native")
    assert sum(t.numel() for t in kept if t.data_ptr() != v.data_ptr()) == fields * v.numel()
    with torch.no_grad():
        assert torch.ops.patchreg.integrate(v, 7, True, False)[1].numel() == 0


def test_memory_and_work_of_the_backward_pass(extension, generator, monkeypatch):
    """Four fields for seven steps, the gradient included, and nine squarings more, as documented."""
    from patchreg.ops.compose import native

    made, squarings = [], []

    class Counted(native._Squaring):
        def take(self):
            if not self.free:
                made.append(1)
            return super().take()

        def square(self, *arguments):
            squarings.append(1)
            super().square(*arguments)

    monkeypatch.setattr(native, "_Squaring", Counted)
    v = field(generator, shape=(3, 4, 5))
    torch.ops.patchreg.integrate_backward(torch.ones_like(v), v, v.new_empty(0), 7, True)
    assert (len(made), len(squarings)) == (4, 9)
    made.clear()
    _, fields = torch.ops.patchreg.integrate(v, 7, True, True)
    torch.ops.patchreg.integrate_backward(torch.ones_like(v), v, fields, 7, True)
    assert len(made) == 2
    made.clear()
    torch.ops.patchreg.integrate(v, 7, True, False)
    assert len(made) == 1  # beside the result


def test_the_number_of_threads_changes_nothing(extension, generator):
    v = field(generator, shape=(40, 50, 37))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(ops.integrate, [v], "native", [torch.float32], "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_fields_that_are_not_contiguous(kernel_device, generator):
    v = field(generator).to(kernel_device)
    turned = v.movedim(1, -1).contiguous().movedim(-1, 1)
    assert torch.equal(ops.integrate(turned, backend="native"), ops.integrate(v, backend="native"))
    assert torch.equal(ops.compose(turned, v, backend="native"), ops.compose(v, turned, backend="native"))


def test_what_cannot_be_is_told(extension, generator):
    v = field(generator)
    with pytest.raises(BackendUnavailable, match="not torch.float64"):
        ops.integrate(v.double(), backend="native")
    with pytest.raises(BackendUnavailable, match="not torch.float64"):
        ops.compose(v, v.double(), backend="native")
    with pytest.raises(InputError, match="memory must be"):
        ops.integrate(v, memory="none")
    with pytest.raises(InputError, match="padding must be"):
        ops.integrate(v, padding="wrap")
    with pytest.raises(InputError, match="affine must have shape"):
        ops.compose(v, v, torch.eye(4))
    with pytest.raises(InputError, match="different batch sizes"):
        ops.compose(field(generator, 2), field(generator, 3))


def test_without_the_extension_the_reference_runs(generator, monkeypatch):
    v = field(generator)
    expected = ops.integrate(v, backend="reference")
    monkeypatch.setattr(cpu, "find_extension", lambda: None)
    assert torch.equal(ops.integrate(v), expected)
    with pytest.raises(BackendUnavailable, match="no compiled CPU kernels"):
        ops.compose(v, v, backend="native")
