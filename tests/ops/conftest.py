"""The emulation of CUDA, for the tests of operations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulation import emulator

from patchreg.ops import cpu
from patchreg.ops.cuda import launch


@pytest.fixture(scope="session")
def emulation_folder(request: pytest.FixtureRequest) -> Path:
    """Where emulated kernels are kept from run to run."""
    assert request.config.cache is not None
    return Path(request.config.cache.mkdir("emulated_kernels"))


@pytest.fixture
def emulated_cuda(emulation_folder: Path) -> Iterator[emulator.Emulator]:
    """Within the test, CPU tensors take the CUDA path and its kernels run on the CPU, in both orders of the threads.

    torch.empty gives NaN, so that an output that is not written whole shows.
    """
    reason = emulator.why_not()
    if reason is not None:
        pytest.skip(reason)
    made = emulator.Emulator(emulation_folder)
    previous = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with launch.emulate(made):
            yield made
    finally:
        torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])


@pytest.fixture(params=["cpu", "emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where a native kernel runs: the compiled extension, the CUDA text emulated on the CPU, and a GPU."""
    if request.param == "emulated":
        request.getfixturevalue("emulated_cuda")
    elif request.param == "cpu" and cpu.find_extension() is None:
        pytest.skip("patchreg was installed without its compiled CPU kernels")
    elif request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda" if request.param == "gpu" else "cpu")
