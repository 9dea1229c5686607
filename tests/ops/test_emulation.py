"""The emulation of CUDA finds the faults that it is there to find, and runs right kernels right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulation import emulator
from emulation.emulator import EmulationError

from patchreg.ops.cuda import launch

PLANTED = Path(emulator.__file__).parent / "planted.cu"


def run(entry, *arguments, grid=(1, 1, 1), block=(64, 1, 1), shared=0):
    launch.launch(PLANTED, f"planted::{entry}", grid, block, arguments, torch.device("cpu"), shared)


@pytest.fixture
def data(generator):
    return torch.rand(64, generator=generator)


def test_empty_tensors_are_poisoned(emulated_cuda):
    assert torch.empty(5).isnan().all()


def test_right_kernels_are_right(emulated_cuda, data):
    out = torch.empty(64)
    run("shift<true>", data, out)
    assert torch.equal(out, data.roll(-1))
    smooth = data.clone()
    run("smooth_twice<true>", smooth)
    expected = data
    for _ in range(2):
        expected = expected.roll(1) + expected.roll(-1)
    assert torch.allclose(smooth, expected)
    run("copy", data, out, 0, 0)
    assert torch.equal(out, data)


def test_sums_over_a_block(emulated_cuda, data):
    by_atomics, by_block = torch.zeros(1), torch.empty(1)
    run("sums", 1000 * data, by_atomics, by_block)
    assert float(by_block) == pytest.approx(1000 * float(data.double().sum()), rel=1e-6)
    assert float(by_atomics) == pytest.approx(float(by_block), rel=1e-5)


def test_records_launches(emulated_cuda, data):
    run("copy", data, torch.empty(64), 0, 0)
    assert emulated_cuda.launches == [emulator.Launched("planted.cu", "planted::copy", (1, 1, 1), (64, 1, 1), 0)]


def test_leaves_no_memory_mapped(emulated_cuda):
    """Every library has stacks of its own, two mappings each; kept, those of all kernels would exceed what Linux allows."""

    def mappings():
        return len(Path("/proc/self/maps").read_text().splitlines())

    values = torch.rand(1024)
    run("copy", values[:64], torch.empty(64), 0, 0)  # loads the library
    before = mappings()
    run("copy", values, torch.empty(1024), 0, 0, block=(1024, 1, 1))
    assert mappings() < before + 100


@pytest.mark.parametrize("entry", ["shift<false>", "smooth_twice<false>"])
def test_missing_barrier(entry, emulated_cuda, data):
    arguments = [data, torch.empty(64)] if entry.startswith("shift") else [data]
    with pytest.raises(EmulationError, match="depends on the order of the threads"):
        run(entry, *arguments)


def test_result_that_depends_on_luck(emulated_cuda):
    with pytest.raises(EmulationError, match="depends on the order of the threads"):
        run("last_writer_wins", torch.empty(1))


def test_divergent_barriers(emulated_cuda):
    with pytest.raises(EmulationError, match="divergent barrier"):
        run("two_barriers", torch.empty(64))


def test_deadlock(emulated_cuda):
    with pytest.raises(EmulationError, match="deadlock"):
        run("warp_against_block", torch.empty(64))


def test_shuffle_from_a_lane_that_is_absent(emulated_cuda):
    with pytest.raises(EmulationError, match="lane 20, which takes no part"):
        run("shuffle_from_absent", torch.empty(64), block=(32, 1, 1))


def test_index_outside_a_shared_array(emulated_cuda):
    out = torch.empty(64)
    run("shared_index", out, 0)
    assert torch.equal(out, torch.ones(64))
    with pytest.raises(EmulationError, match="undefined behaviour.*planted.cu:"):
        run("shared_index", out, 1)


@pytest.mark.parametrize("past", [-1, 1, 1000, 1_000_000])
def test_index_outside_dynamic_shared_memory(past, emulated_cuda):
    with pytest.raises(EmulationError, match="out of bounds: .* dynamic shared memory"):
        run("dynamic_index", torch.empty(64), past, shared=64 * 4)


@pytest.mark.parametrize("past", [-1, 1, 100, 1_000_000])
@pytest.mark.parametrize("what", ["read", "write"])
def test_index_outside_a_tensor(what, past, emulated_cuda, data):
    with pytest.raises(EmulationError, match=r"out of bounds: (byte .* of argument.*planted.cu:|a write beside)"):
        run("copy", data, torch.empty(64), *((past, 0) if what == "read" else (0, past)))


@pytest.mark.parametrize("past", [-3, 3])
def test_write_beside_a_tensor_of_odd_size(past, emulated_cuda, data):
    """The few bytes that alignment leaves between the tensor and the guard are watched as well."""
    with pytest.raises(EmulationError, match="out of bounds"):
        run("copy", data, torch.empty(61)[1:], 0, past, block=(60, 1, 1))


def test_shared_memory_starts_as_nan(emulated_cuda):
    out = torch.empty(64)
    run("reads_unwritten_shared", out)
    assert out[:60].eq(1).all()
    assert out[60:].isnan().all()


def test_misaligned_vector(emulated_cuda, data):
    with pytest.raises(EmulationError, match="undefined behaviour"):
        run("misaligned", data, torch.empty(64))


def test_overflow(emulated_cuda):
    with pytest.raises(EmulationError, match="undefined behaviour"):
        run("int_overflow", torch.empty(64), 100_000)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"grid": (1, 65536, 1)}, "limit"),
        ({"grid": (1, 1, 0)}, "empty"),
        ({"block": (32, 33, 1)}, "limit of 1024 threads"),
        ({"block": (1, 1, 65)}, "64 along z"),
        ({"shared": 100 * 1024}, "shared memory"),
    ],
)
def test_launches_beyond_a_devices_limits(limits, message, emulated_cuda, data):
    with pytest.raises(EmulationError, match=message):
        run("copy", data, torch.empty(64), 0, 0, **limits)


def test_static_shared_memory_beyond_the_limit(emulated_cuda):
    with pytest.raises(EmulationError, match="53248 bytes of static shared memory"):
        run("static_shared<13 * 1024>", torch.empty(64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 0), "2 arguments for a kernel of 4"), ((0, 0, 0, 0), "argument 0"), ((None, None, 0.5, 0), "argument 2")],
)
def test_wrong_arguments(arguments, message, emulated_cuda):
    with pytest.raises(EmulationError, match=message):
        run("copy", *arguments)


def test_absent_tensor_is_a_null_pointer(emulated_cuda, data):
    with pytest.raises(EmulationError, match=r"undefined behaviour|no argument's"):
        run("copy", None, data, 0, 0)


def test_runs_go_on_after_a_fault(emulated_cuda, data):
    out = torch.empty(64)
    for _ in range(3):
        with pytest.raises(EmulationError):
            run("copy", data, out, 1000, 0)
        run("copy", data, out, 0, 0)
        assert torch.equal(out, data)


def test_text_that_does_not_compile(emulated_cuda):
    with pytest.raises(EmulationError, match="g\\+\\+ cannot compile planted::absent"):
        run("absent")


def test_tensors_must_be_contiguous(emulated_cuda, data):
    with pytest.raises(ValueError, match="contiguous"):
        run("copy", data.view(8, 8).T, torch.empty(64), 0, 0)
