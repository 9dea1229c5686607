"""Kernels started on torch's current stream.

A kernel is compiled (or read from the cache on disk) and loaded at its first launch on a device. That cannot happen
while a stream is captured into a CUDA graph: run the operation once before capturing, as torch's own examples do.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from patchreg.errors import BackendUnavailable
from patchreg.ops.cuda.compile import compile_kernel

_log = logging.getLogger(__name__)

Size = tuple[int, int, int]
Argument = Tensor | int | float | None

_OLDEST_CAPABILITY = (7, 5)  # that NVRTC 13 compiles for
_UNASKED_SHARED = 40 * 1024  # that every kernel may have: 48 KB, its static arrays among them


class Launcher(Protocol):
    """What takes launches in place of the driver."""

    def launch(
        self,
        source: str | Path,
        entry: str,
        grid: Size,
        block: Size,
        arguments: Sequence[Argument],
        shared: int,
    ) -> None:
        """As :func:`launch`, finished on return."""
        ...


@dataclass
class _State:
    """What this process has loaded, and what failed. Guarded by ``lock``."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    functions: dict[tuple[str, str, int], Any] = field(default_factory=dict)  # by source, entry and device
    libraries: list[Any] = field(default_factory=list)
    shared: dict[tuple[str, str, int], int] = field(default_factory=dict)
    contexts: dict[int, Any] = field(default_factory=dict)
    reasons: dict[int, str | None] = field(default_factory=dict)
    emulator: Launcher | None = None


_state = _State()


class DriverError(RuntimeError):
    """The driver refused a call, or reports an error of earlier work."""

    def __init__(self, driver: Any, status: Any) -> None:
        _, text = driver.cuGetErrorString(status)
        name = getattr(status, "name", status)
        super().__init__(f"CUDA driver: {name} ({text.decode() if text else 'unknown'})")
        self.code = int(status)

    @property
    def passes(self) -> bool:
        """Whether it says nothing of the kernel: no memory is left, earlier work failed, or a graph is captured."""
        return self.code == 2 or 700 <= self.code < 800 or self.code >= 900


@contextmanager
def emulate(launcher: Launcher) -> Iterator[None]:
    """Within it, CPU tensors take the CUDA path, and ``launcher`` runs the kernels: for tests."""
    previous, _state.emulator = _state.emulator, launcher
    try:
        yield
    finally:
        _state.emulator = previous


def emulated() -> bool:
    """Whether launches go to an emulator instead of a device."""
    return _state.emulator is not None


def use_cuda(tensor: Tensor) -> bool:
    """Whether an operation on ``tensor`` takes its CUDA path."""
    return tensor.is_cuda or emulated()


def why_not(device: torch.device) -> str | None:
    """Why CUDA kernels cannot run on ``device``, or None where they can.

    The first question about a device compiles and loads a small kernel, so that a missing library, or a driver older
    than NVRTC, is found before an operation relies on it.
    """
    if emulated():
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.cuda is None:
        return "this torch is built for another platform than CUDA"
    index = _index(device)
    with _state.lock:
        if index not in _state.reasons:
            with torch.cuda.device(index):
                if torch.cuda.is_current_stream_capturing():
                    return None  # nothing can be loaded now to find out, as the launch will say
                _state.reasons[index] = _find_problem(index)
            if _state.reasons[index] is not None:
                _log.warning("no CUDA kernels on device %d: %s", index, _state.reasons[index])
        return _state.reasons[index]


def launch(
    source: str | Path,
    entry: str,
    grid: Size,
    block: Size,
    arguments: Sequence[Argument],
    device: torch.device,
    shared: int = 0,
) -> None:
    """Start a kernel on torch's current stream of ``device``, and return at once.

    Memory that torch allocated on that stream, and frees after this call, is not used again before the kernel is done.

    Args:
        source: a file of ``csrc/cuda``.
        entry: a kernel in it, with namespace and template arguments: ``"patchreg::warp_forward<float, true>"``.
        grid: blocks along x, y, z; at most 65535 along y and z.
        block: threads along x, y, z; at most 1024 in all.
        arguments: a contiguous tensor or None for a pointer, an int for ``long long``, a float for ``float``.
        device: of the tensors.
        shared: bytes of dynamic shared memory.

    Raises:
        BackendUnavailable: the kernel cannot be compiled or loaded here. It is remembered: from then on
            :func:`why_not` gives the reason, and operations with ``backend="auto"`` do without kernels.
        ValueError: a tensor that is not contiguous or on another device.
        RuntimeError: the driver refuses the launch, or reports an error of earlier work; or the kernel's first launch
            on this device is captured into a CUDA graph.
    """
    for argument in arguments:
        if isinstance(argument, Tensor) and (argument.device != device or not argument.is_contiguous()):
            raise ValueError(f"{entry} needs contiguous tensors on {device}, got one on {argument.device}")
    if _state.emulator is not None:
        _state.emulator.launch(source, entry, grid, block, arguments, shared)
        return
    driver = _driver()
    values = [_as_parameter(argument) for argument in arguments]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        function = _function(driver, source, entry, _index(device), shared)
        where = (*grid, *block, shared, stream)
        _check(driver, driver.cuLaunchKernel(function, *where, ctypes.addressof(addresses), 0))


def _as_parameter(argument: Argument) -> ctypes.c_void_p | ctypes.c_longlong | ctypes.c_float:
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_longlong(argument)
    return ctypes.c_float(argument)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _find_problem(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST_CAPABILITY:
        needed, found = (".".join(map(str, each)) for each in (_OLDEST_CAPABILITY, capability))
        return f"kernels need compute capability {needed} or newer, {torch.cuda.get_device_name(index)} has {found}"
    try:
        _function(_driver(), "probe.cu", "patchreg::probe", index, 0)
    except RuntimeError as error:
        if isinstance(error, DriverError) and error.passes:
            raise
        return str(error)
    return None


def _function(driver: Any, source: str | Path, entry: str, index: int, shared: int) -> Any:
    """What the driver launches on the thread's current device: compiled, and loaded there, once in a process."""
    key = (str(source), entry, index)
    with _state.lock:
        _bind_context(driver, index)
        function = _state.functions.get(key)
        if function is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{entry} cannot be loaded while a CUDA graph is captured: run the operation, and its backward pass, "
                    "once before capturing"
                )
            try:
                function = _state.functions[key] = _load(driver, source, entry, index)
            except BackendUnavailable as error:
                _state.reasons[index] = str(error)
                _log.warning("no CUDA kernels on device %d from now on: %s", index, error)
                raise
        if shared > _state.shared.get(key, _UNASKED_SHARED):
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver, driver.cuFuncSetAttribute(function, limit, shared))
            _state.shared[key] = shared
        return function


def _bind_context(driver: Any, index: int) -> None:
    """Give a thread that has no context that of torch on its current device.

    Threads begin without one, those of autograd's backward pass among them, and torch's guard leaves it at that where
    the device is the thread's already: torch needs none before its first call of the runtime, but the driver does.
    """
    if int(_check(driver, driver.cuCtxGetCurrent())) != 0:
        return
    if index not in _state.contexts:
        place = _check(driver, driver.cuDeviceGet(index))
        _state.contexts[index] = _check(driver, driver.cuDevicePrimaryCtxRetain(place))
    _check(driver, driver.cuCtxSetCurrent(_state.contexts[index]))


def _load(driver: Any, source: str | Path, entry: str, index: int) -> Any:
    binary = compile_kernel(source, entry, _architecture(index))
    try:
        library = _check(driver, driver.cuLibraryLoadData(binary.code, [], [], 0, [], [], 0))
        _state.libraries.append(library)  # the handle must outlive its kernels
        kernel = _check(driver, driver.cuLibraryGetKernel(library, binary.symbol.encode()))
        # The driver loads lazily: only here does it see whether the device can run the code.
        return _check(driver, driver.cuKernelGetFunction(kernel))
    except RuntimeError as error:
        if isinstance(error, DriverError) and error.passes:
            raise
        raise BackendUnavailable(f"the CUDA driver cannot load {entry} of {source}: {error}") from error


def _driver() -> Any:
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise BackendUnavailable(
            f"kernels are launched by cuda.bindings, which is not installed ({error}): "
            "CUDA builds of torch>=2.11 bring it, otherwise run `pip install cuda-bindings`"
        ) from error


def _check(driver: Any, returned: tuple[Any, ...]) -> Any:
    status, *values = returned
    if int(status) != 0:
        raise DriverError(driver, status)
    return values[0] if len(values) == 1 else tuple(values)
