"""The calls of the CUDA driver, received by a stub that writes them down: no GPU is needed to see that they are right."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from emulation import emulator

from patchreg import ops
from patchreg.errors import BackendUnavailable
from patchreg.ops.cuda import launch

REPOSITORY = Path(__file__).parents[2]

PRETEND = """
import contextlib, ctypes, os, sys, threading, types, torch
from patchreg.ops.cuda.compile import compile_kernel
for source, entry in (({planted!r}, "planted::copy"), ("probe.cu", "patchreg::probe")):
    compile_kernel(source, entry, 90)  # into the cache: NVRTC, which looks for a driver too, would stumble over the stub
ctypes.CDLL(os.environ["PATCHREG_STUB"])  # who asks for libcuda.so.1 from now on gets this one
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda index: capability
torch.cuda.get_device_name = lambda index: "an old one"
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.cuda.current_stream = lambda device: types.SimpleNamespace(cuda_stream=0xabc)
torch.cuda.is_current_stream_capturing = lambda: capturing
capturing = False
capability = (9, 0)
from patchreg import ops
from patchreg.errors import BackendUnavailable
from patchreg.ops.cuda import launch
device = torch.device("cpu")
tensor = torch.zeros(4)
def start(shared=0, entry="planted::copy"):
    launch.launch({planted!r}, entry, (7, 6, 5), (64, 2, 1), [tensor, None, 2**40 + 1, -0.75], device, shared)
"""


@pytest.fixture(scope="module")
def stub_driver(tmp_path_factory):
    """A libcuda.so.1 that only writes down what it is asked."""
    if not sys.platform.startswith("linux") or shutil.which("g++") is None:
        pytest.skip("the stub of the CUDA driver needs Linux and g++")
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        pytest.skip("cuda.bindings is not installed")
    library = tmp_path_factory.mktemp("stub_driver") / "libcuda.so.1"
    source = Path(emulator.__file__).parent / "stub_driver.cpp"
    command = ["g++", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    return library


@pytest.fixture
def pretend(stub_driver, tmp_path):
    """Run lines of Python on a machine with a pretended GPU; gives what they print, and the driver's log."""

    def run(lines, fails=""):
        log = tmp_path / "log"
        log.write_text("")
        environment = os.environ | {
            "PATCHREG_STUB": str(stub_driver),
            "PATCHREG_STUB_LOG": str(log),
            "PATCHREG_STUB_PARAMETERS": "4",
            "PATCHREG_STUB_FAILS": fails,
            "PATCHREG_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": str(REPOSITORY),
        }
        script = PRETEND.replace("{planted!r}", repr(str(Path(emulator.__file__).parent / "planted.cu"))) + lines
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr, log.read_text()

    return run


def test_a_launch(pretend):
    out, log = pretend("start()\nstart()\nprint(hex(tensor.data_ptr())[2:])\n")
    retained, bound, loaded, found, function, *launches = log.splitlines()
    assert [retained, bound] == ["retain 10", "current 0x4000"]
    assert loaded == "load ELF"
    assert re.fullmatch(r"kernel 0x1000 _ZN7planted4copyE\w+", found)
    assert function == "function of 0x2000"
    assert len(launches) == 2  # loaded once, launched twice
    for each in launches:
        at, parameters = each.split(" parameters ")
        assert at == "launch 0x3000 grid 7 6 5 block 64 2 1 shared 0 stream 0xabc extra (nil)"
        pointer, none, integer, real = parameters.split()
        assert pointer == out.strip()
        assert none == "0"
        assert int(integer, 16) == 2**40 + 1
        assert struct.unpack("f", struct.pack("I", int(real, 16) & 0xFFFFFFFF)) == (-0.75,)


def test_more_shared_memory_is_asked_for_once(pretend):
    _, log = pretend("for shared in (40 * 1024, 60_000, 60_000, 50_000, 70_000): start(shared)\n")
    asked = [each for each in log.splitlines() if each.startswith("attribute")]
    assert asked == ["attribute 8 60000 0x3000", "attribute 8 70000 0x3000"]


def test_every_thread_gets_a_context(pretend):
    """Autograd's and the caller's threads begin without one, and the stub refuses a launch like the driver."""
    lines = """
start()
for _ in range(2):
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
"""
    _, log = pretend(lines)
    assert [each.split()[0] for each in log.splitlines()] == [
        *("retain", "current", "load", "kernel", "function", "launch"),
        *("current", "launch"),
        *("current", "launch"),
    ]


def test_nothing_is_loaded_while_a_graph_is_captured(pretend):
    lines = """
capturing = True
print(1, launch.why_not(device))
try: start()
except RuntimeError as error: print(2, error)
capturing = False
print(3, launch.why_not(device))
start()
capturing = True
start()
"""
    out, log = pretend(lines)
    assert "1 None\n2 planted::copy cannot be loaded while a CUDA graph is captured" in out
    assert "3 None" in out  # it is not held against the device
    assert log.count("launch") == 2


def test_a_lack_of_memory_is_not_remembered(pretend):
    lines = """
for _ in range(2):
    try: start()
    except BackendUnavailable as error: print(type(error))
    except RuntimeError as error: print(error)
os.environ["PATCHREG_STUB_FAILS"] = ""
ctypes.CDLL(None).unsetenv(b"PATCHREG_STUB_FAILS")
print(launch.why_not(device))
start()
"""
    out, log = pretend(lines, fails="memory")
    assert out == 2 * "CUDA driver: CUDA_ERROR_OUT_OF_MEMORY (as asked)\n" + "None\n"
    assert log.count("launch") == 1


def test_a_refused_launch_raises(pretend):
    out, _ = pretend("try: start()\nexcept RuntimeError as error: print(error)\n", fails="cuLaunchKernel")
    assert "CUDA driver: CUDA_ERROR_LAUNCH_FAILED (as asked)" in out


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("cuLibraryLoadData", "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
        ("cuKernelGetFunction", "CUDA_ERROR_NO_BINARY_FOR_GPU"),  # of a library that is loaded lazily
    ],
)
def test_what_cannot_be_loaded_is_remembered(fails, says, pretend):
    lines = """
print(1, launch.why_not(device))
print(2, launch.why_not(device))
try: start()
except BackendUnavailable as error: print(3, error)
"""
    out, log = pretend(lines, fails=fails)
    reason = f"the CUDA driver cannot load patchreg::probe of probe.cu: CUDA driver: {says}"
    assert f"1 {reason}" in out
    assert f"2 {reason}" in out
    assert "3 the CUDA driver cannot load planted::copy" in out
    assert out.count("no CUDA kernels on device 0: ") == 1  # one warning
    assert "function" not in log
    assert "launch" not in log


def test_text_that_does_not_compile_turns_kernels_off(pretend):
    lines = """
print(1, launch.why_not(device))
def compile_kernel(*_): raise BackendUnavailable("NVRTC could not")
launch.compile_kernel = compile_kernel
try: start()
except BackendUnavailable as error: print(2, error)
print(3, launch.why_not(device))
"""
    out, _ = pretend(lines)
    assert "1 None\n2 NVRTC could not\n3 NVRTC could not\n" in out
    assert "no CUDA kernels on device 0 from now on: NVRTC could not" in out


def test_old_devices_are_refused_by_name(pretend):
    out, log = pretend("capability = (7, 0)\nprint(launch.why_not(device))\n")
    assert "kernels need compute capability 7.5 or newer, an old one has 7.0" in out
    assert log == ""


def test_no_driver_is_touched_without_a_device(pretend):
    out, log = pretend("torch.cuda.is_available = lambda: False\nprint(launch.why_not(device))\n")
    assert out.startswith("torch finds no CUDA device")
    assert log == ""


def test_missing_bindings_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(BackendUnavailable, match="pip install cuda-bindings"):
        launch._driver()


def test_tensors_of_another_device_are_refused():
    with pytest.raises(ValueError, match="contiguous tensors on cuda:0, got one on cpu"):
        launch.launch("probe.cu", "patchreg::probe", (1, 1, 1), (1, 1, 1), [torch.zeros(1)], torch.device("cuda:0"))


@pytest.mark.gpu
def test_a_new_thread_on_a_gpu():
    """Its first use of the GPU is a launch: the memory comes from what torch has left over, without the runtime."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    image = torch.rand(1, 1, 9, 10, 11, device="cuda")
    found = [ops.lncc(image, image, backend="native")]
    thread = threading.Thread(target=lambda: found.append(ops.lncc(image, image, backend="native")))
    thread.start()
    thread.join()
    assert torch.equal(*found)


@pytest.mark.gpu
def test_a_first_launch_in_a_graph_on_a_gpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    source = tmp_path / "new.cu"
    source.write_text("__global__ void fill(float* out) { *out = 3.0f; }\n")
    out = torch.zeros(1, device="cuda")

    def start():
        launch.launch(source, "fill", (1, 1, 1), (1, 1, 1), [out], out.device)

    with pytest.raises(RuntimeError, match="once before capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        start()
    start()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        start()
    out.zero_()
    graph.replay()
    assert out.item() == 3
    assert launch.why_not(out.device) is None
