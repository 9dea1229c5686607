"""The fused LNCC kernels against the reference in float64: the extension, the CUDA text on the CPU, and a GPU."""

from __future__ import annotations

import pytest
import torch

from patchreg import ops
from patchreg.errors import BackendUnavailable, InputError
from patchreg.memory import LivePeak
from patchreg.ops import cpu
from patchreg.ops.lncc import native
from patchreg.ops.windows import gaussian_smooth

SMALL = (13, 10, 19)


def noise(generator, shape):
    return torch.rand(shape, generator=generator)


def brain_like(generator, shape):
    """Tissues of a few brightnesses with texture, and a background of exact zeros around them."""
    smooth = gaussian_smooth(torch.rand(shape, generator=generator), (1.5, 1.5, 1.5))
    tissue = 0.2 + 0.3 * (smooth > smooth.median()).float() + 0.05 * torch.rand(shape, generator=generator)
    tissue[..., : shape[2] // 4, :, :] = 0
    tissue[..., :, -shape[3] // 4 :, :] = 0
    return tissue


def with_constant_region(generator, shape):
    image = torch.rand(shape, generator=generator)
    image[..., shape[2] // 3 :, : shape[3] // 2 + 1, :] = 0.7
    return image


KINDS = {
    "noise": noise,
    "brain": brain_like,
    "raw intensities": lambda g, s: (4095 * brain_like(g, s)).round(),
    "far from zero": lambda g, s: 10 + noise(g, s),
    "constant region": with_constant_region,
}


def run(I, J, backend, dtype, device, **options):
    """The value, and its gradients to both images."""
    i, j = (x.to(device, dtype).detach().requires_grad_() for x in (I, J))
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    upstream = options.pop("upstream", None)
    value = ops.lncc(i, j, backend=backend, **options)
    value.backward(None if value.ndim == 0 else upstream.to(value.dtype))
    return [t.detach().double().cpu() for t in (value, i.grad, j.grad)]


def agrees(I, J, device, tolerances, dtype=torch.float32, gradient=None, **options):
    exact = run(I, J, "reference", torch.float64, "cpu", **{k: v for k, v in options.items() if k != "memory"})
    found = run(I, J, "native", dtype, device, **options)
    value_tolerance = tolerances.kernel_value if dtype == torch.float32 else tolerances.half
    assert (found[0] - exact[0]).norm() <= value_tolerance * exact[0].norm()
    allowed = gradient or (tolerances.kernel_gradient if dtype == torch.float32 else tolerances.half)
    for name, grad, exact_grad in zip(("fixed", "moving"), found[1:], exact[1:], strict=True):
        assert torch.isfinite(grad).all()
        assert (grad - exact_grad).norm() <= allowed * exact_grad.norm(), f"gradient to {name}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [3, 5, 7, 9, 11])
def test_box(kind, window, kernel_device, generator, tolerances):
    I, J = (KINDS[kind](generator, (1, 1, *SMALL)) for _ in range(2))
    # Beside the zeros outside the volume, 10 is such a step.
    gradient = tolerances.kernel_gradient_at_steps if kind == "far from zero" else None
    agrees(I, J, kernel_device, tolerances, gradient=gradient, window=window)


@pytest.mark.parametrize("kind", ["noise", "brain", "raw intensities"])
@pytest.mark.parametrize("window", [5, 9])
def test_gaussian(kind, window, kernel_device, generator, tolerances):
    I, J = (KINDS[kind](generator, (1, 1, *SMALL)) for _ in range(2))
    gradient = None if kind == "noise" else tolerances.kernel_gradient_at_steps
    agrees(I, J, kernel_device, tolerances, gradient=gradient, window=window, kernel="gaussian")


@pytest.mark.parametrize("shape", [(1, 5, 7), (1, 1, 1), (2, 33, 3), (40, 1, 6), (9, 8, 67)])
@pytest.mark.parametrize("window", [3, 9, 21])
def test_shapes_and_windows_larger_than_an_axis(shape, window, kernel_device, generator, tolerances):
    I, J = (noise(generator, (2, 2, *shape)) for _ in range(2))
    agrees(I, J, kernel_device, tolerances, window=window)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(65, 70, 63), (31, 37, 29), (20, 50, 300)])
@pytest.mark.parametrize("window", [5, 9])
def test_shapes_of_several_tiles(shape, window, generator, tolerances):
    if cpu.find_extension() is None:
        pytest.skip("patchreg was installed without its compiled CPU kernels")
    I, J = (brain_like(generator, (1, 1, *shape)) for _ in range(2))
    agrees(I, J, "cpu", tolerances, window=window)


@pytest.mark.parametrize("kernel", ["box", "gaussian"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masks_with_holes(kernel, reduction, kernel_device, generator, tolerances):
    I, J = (brain_like(generator, (2, 2, *SMALL)) for _ in range(2))
    mask = torch.rand((2, 1, *SMALL), generator=generator) > 0.4
    mask[:, :, 3:6, 2:8, 5:15] = False
    upstream = torch.rand(I.shape, generator=generator)
    gradient = None if kernel == "box" else tolerances.kernel_gradient_at_steps
    options = {"kernel": kernel, "mask": mask, "reduction": reduction, "upstream": upstream}
    agrees(I, J, kernel_device, tolerances, gradient=gradient, window=5, **options)


@pytest.mark.parametrize("memory", ["stored", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(memory, reduction, kernel_device, generator, tolerances):
    I, J = (noise(generator, (2, 1, *SMALL)) for _ in range(2))
    upstream = torch.randn(I.shape, generator=generator)
    agrees(I, J, kernel_device, tolerances, window=7, reduction=reduction, memory=memory, upstream=upstream)


@pytest.mark.parametrize("memory", ["stored", "recompute"])
@pytest.mark.parametrize("to", ["fixed", "moving"])
def test_gradient_to_one_image(memory, to, kernel_device, generator, tolerances):
    I, J = (brain_like(generator, (1, 1, *SMALL)) for _ in range(2))
    both = run(I, J, "native", torch.float32, kernel_device, window=5, memory=memory)
    i, j = I.to(kernel_device), J.to(kernel_device)
    wanted = i if to == "fixed" else j
    wanted.requires_grad_()
    ops.lncc(i, j, 5, memory=memory, backend="native").backward()
    expected = both[1] if to == "fixed" else both[2]
    assert (wanted.grad.cpu().double() - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage(dtype, kernel_device, generator, tolerances):
    """The arithmetic is float32's: against the same rounded images in float64 only the gradient's rounding is left."""
    I, J = ((1000 * brain_like(generator, (1, 2, *SMALL))).to(dtype).float() for _ in range(2))
    agrees(I, J, kernel_device, tolerances, dtype=dtype, window=5, reduction="sum")
    value = ops.lncc(*(x.to(kernel_device, dtype) for x in (I, J)), 5, backend="native")
    exact = ops.lncc(I.double(), J.double(), 5)
    assert value.dtype == torch.float32
    assert abs(float(value) - float(exact)) <= tolerances.kernel_value * float(exact)


@pytest.mark.parametrize("value", [0.0, 1.0, 4095.0])
def test_a_constant_image_gives_zero_and_no_nan(value, kernel_device, generator):
    I, J = torch.full((1, 1, *SMALL), value), 100 * noise(generator, (1, 1, *SMALL))
    map_, grad_I, grad_J = run(I, J, "native", torch.float32, kernel_device, window=5, reduction="none",
                               upstream=torch.ones(I.shape))  # fmt: skip
    assert map_[..., 2:-2, 2:-2, 2:-2].abs().max() == 0
    assert torch.isfinite(grad_I).all()
    assert torch.isfinite(grad_J).all()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_operators_are_registered_right(requires_grad, kernel_device, generator):
    I, J = (noise(generator, (2, 2, 5, 6, 7)).to(kernel_device).requires_grad_(requires_grad) for _ in range(2))
    mask = (torch.rand((1, 1, 5, 6, 7), generator=generator) > 0.3).to(kernel_device, torch.uint8)
    upstream = torch.rand((), generator=generator).to(kernel_device)
    for selected in (None, mask):
        options = (selected, 3, 1e-5, False)
        torch.library.opcheck(native.lncc_sum, (I, J, *options))
        torch.library.opcheck(native.lncc_map, (I, J, *options))
        torch.library.opcheck(native.lncc_sum_stored, (I, J, *options, requires_grad, requires_grad))
        torch.library.opcheck(native.lncc_gradients, (upstream, I.detach(), J.detach(), *options, True, False))


@pytest.mark.parametrize("options", [{}, {"memory": "recompute"}, {"reduction": "none"}, {"kernel": "gaussian"}])
def test_compiles_in_one_graph(options, generator):
    I, J = (noise(generator, (1, 1, *SMALL)).requires_grad_() for _ in range(2))
    mask = torch.rand((1, 1, *SMALL), generator=generator) > 0.3

    def loss(i, j):
        return ops.lncc(i, j, 5, mask=mask, **options).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = (torch.autograd.grad(f(I, J), (I, J)) for f in (loss, compiled))
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_volumes_that_are_not_contiguous(kernel_device, generator):
    I, J = (noise(generator, (1, 1, 12, 11, 10)) for _ in range(2))
    turned = ops.lncc(*(x.to(kernel_device).transpose(2, 4) for x in (I, J)), 5, backend="native")
    copied = ops.lncc(*(x.transpose(2, 4).contiguous().to(kernel_device) for x in (I, J)), 5, backend="native")
    assert torch.equal(turned, copied)


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(name, generator, tolerances):
    extension = cpu.find_extension()
    if extension is None:
        pytest.skip("patchreg was installed without its compiled CPU kernels")
    best = extension.instruction_set()
    try:
        extension.use_instruction_set(name)
    except ValueError:
        pytest.skip(f"this processor does not run {name}")
    try:
        I, J = (brain_like(generator, (1, 1, 21, 18, 37)) for _ in range(2))
        for window in (5, 9):
            agrees(I, J, "cpu", tolerances, window=window)
    finally:
        extension.use_instruction_set(best)


def test_the_number_of_threads_changes_nothing(generator):
    if cpu.find_extension() is None:
        pytest.skip("patchreg was installed without its compiled CPU kernels")
    I, J = (brain_like(generator, (1, 1, 70, 60, 37)) for _ in range(2))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(I, J, "native", torch.float32, "cpu", window=7))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("memory", ["stored", "recompute"])
def test_a_second_derivative_is_refused(memory, kernel_device, generator):
    I, J = (noise(generator, (1, 1, 6, 6, 6)).to(kernel_device).requires_grad_() for _ in range(2))
    (grad,) = (
        torch.autograd.grad(ops.lncc(I, J, 3, memory=memory, backend="native"), I, create_graph=True)
        if (memory == "recompute")
        else (None,)
    )
    with pytest.raises(RuntimeError, match="second derivative|no autograd formula"):
        if grad is None:
            torch.autograd.grad(ops.lncc(I, J, 3, memory=memory, backend="native"), I, create_graph=True)
        else:
            grad.sum().backward()


def test_what_no_kernel_takes_is_told(generator):
    I = noise(generator, (1, 1, 6, 6, 6))
    with pytest.raises(BackendUnavailable, match="not torch.float64"):
        ops.lncc(I.double(), I.double(), 3, backend="native")
    with pytest.raises(BackendUnavailable, match="not for meta"):
        ops.lncc(I.to("meta"), I.to("meta"), 3, backend="native")
    with pytest.raises(InputError, match="memory must be"):
        ops.lncc(I, I, 3, memory="none")


def test_without_the_extension_the_reference_runs(generator, monkeypatch):
    I = noise(generator, (1, 1, 6, 6, 6))
    expected = ops.lncc(I, I, 3, backend="reference")
    monkeypatch.setattr(cpu, "find_extension", lambda: None)
    assert torch.equal(ops.lncc(I, I, 3), expected)
    with pytest.raises(BackendUnavailable, match="no compiled CPU kernels"):
        ops.lncc(I, I, 3, backend="native")


@pytest.mark.parametrize(
    ("memory", "images", "volumes"),
    [("stored", 2, 4), ("stored", 1, 2), ("recompute", 2, 2), ("recompute", 1, 1)],
)
def test_memory_in_volumes(memory, images, volumes, generator):
    """The gradients, and what is kept for them: as many again, or nothing."""
    if cpu.find_extension() is None:
        pytest.skip("patchreg was installed without its compiled CPU kernels")
    I, J = (noise(generator, (1, 1, 24, 25, 26)) for _ in range(2))
    i, j = I.requires_grad_(images == 2), J.requires_grad_()
    with LivePeak() as live:
        ops.lncc(i, j, 5, memory=memory).backward()
    assert live.peak == pytest.approx(volumes * I.nbytes, rel=0.01)
