"""How LNCC is laid out on a CUDA device: chunks, boxes, scratch memory, and what is launched."""

from __future__ import annotations

import pytest
import torch

from patchreg import ops
from patchreg.ops.lncc import cuda
from patchreg.ops.lncc.tiles import Mode, Tile, chunk_length

SHAPE = (13, 18, 27)  # two tiles along each of the last axes


def pair(generator, shape=(2, 1, *SHAPE)):
    return (torch.rand(shape, generator=generator) for _ in range(2))


def both_gradients(I, J, window, **options):
    I, J = I.clone().requires_grad_(), J.clone().requires_grad_()
    value = ops.lncc(I, J, window, backend="native", **options)
    value.backward()
    return value.detach(), I.grad, J.grad


def entries(emulator):
    return [each.entry for each in emulator.launches]


@pytest.mark.parametrize("window", [3, 5, 7, 9])
def test_a_box_of_usual_size_is_one_launch(window, emulated_cuda, generator):
    both_gradients(*pair(generator), window)
    assert entries(emulated_cuda) == [f"patchreg::lncc<float, {window // 2}, 2, false>"]
    assert emulated_cuda.launches[0].grid[0] >= 2 * 2 * 2


def test_chunks_agree_with_one_march(emulated_cuda, generator, monkeypatch):
    """Rounding aside: the gradient is formed about an intensity of each chunk."""
    I, J = pair(generator)
    results = []
    for length in (SHAPE[0], 3, 1):
        monkeypatch.setattr(cuda, "chunk_length", lambda *_, length=length: length)
        results.append(both_gradients(I, J, 5))
    for found in results[1:]:
        for each, expected in zip(found, results[0], strict=True):
            assert (each - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("masked", [False, True])
def test_too_little_shared_memory_takes_the_general_kernels(masked, emulated_cuda, generator, monkeypatch):
    I, J = pair(generator)
    mask = torch.rand((2, 1, *SHAPE), generator=generator) > 0.3 if masked else None
    expected = both_gradients(I, J, 5, mask=mask)
    monkeypatch.setattr(cuda, "_device", lambda _: cuda._Device(processors=4, shared_bytes=32 * 1024))
    emulated_cuda.launches.clear()
    found = both_gradients(I, J, 5, mask=mask)
    assert all("lncc_any" in entry for entry in entries(emulated_cuda))
    for each, other in zip(found, expected, strict=True):
        assert (each - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("window", "kernel"), [(11, "box"), (5, "gaussian")])
def test_boxes_agree_with_one(window, kernel, masked, emulated_cuda, generator, monkeypatch):
    I, J = pair(generator)
    mask = torch.rand((2, 1, *SHAPE), generator=generator) > 0.3 if masked else None
    whole = both_gradients(I, J, window, mask=mask, kernel=kernel)
    before = len(emulated_cuda.launches)
    monkeypatch.setattr(cuda, "_box_size", lambda *_: (5, 7))
    boxes = both_gradients(I, J, window, mask=mask, kernel=kernel)
    assert len(emulated_cuda.launches) - before == 3 * 3 * before
    for found, expected in zip(boxes, whole, strict=True):
        assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("shape", [(160, 192, 224), (512, 512, 512), (64, 64, 64), (1, 4000, 4000)])
@pytest.mark.parametrize("window", [5, 11, 21])
def test_scratch_memory_is_bounded(mode, shape, window):
    fixed = torch.empty((1, 1, *shape), device="meta")
    options = cuda.Options(None, window, 1e-5, True)
    size_z, size_j = cuda._box_size(fixed, options, mode)
    assert 1 <= size_z <= shape[0]
    assert 1 <= size_j <= shape[1]
    margin = (1 if mode is Mode.VALUE else 2) * (window // 2)
    rows = min(shape[0], size_z + 2 * margin) * min(shape[1], size_j + 2 * margin)
    assert 4 * 6 * rows * shape[2] <= max(40 * 2**20, 4 * fixed.numel() // 2)


@pytest.mark.parametrize("depth", [1, 2, 7, 160, 161])
@pytest.mark.parametrize("columns", [1, 30, 120, 133, 5000])
def test_chunks_are_the_best_of_all(depth, columns):
    def cost(length):
        waves = -(-columns * -(-depth // length) // 132)
        return waves * -(-(length + 16) // 4)

    assert cost(chunk_length(depth, columns, 16, 132)) == min(cost(length) for length in range(1, depth + 1))


def test_a_small_volume_is_split_to_fill_the_device_and_a_large_one_is_not():
    assert chunk_length(160, 4, 16, 132) < 16
    assert chunk_length(160, 132, 16, 132) == 160


def test_every_kernel_fits_a_device_of_99_kilobytes():
    largest = max(
        Tile(radius, mode, masked).shared_bytes for radius in range(1, 5) for mode in Mode for masked in (False, True)
    )
    assert largest <= 99 * 1024


def test_windows_of_one_voxel(emulated_cuda, generator):
    """A window of one voxel is constant everywhere."""
    value, *grads = both_gradients(*pair(generator), 1)
    assert float(value) == 0
    assert all(grad.abs().max() == 0 for grad in grads)
