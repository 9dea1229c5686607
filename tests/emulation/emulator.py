"""Compiles CUDA kernels with g++ and runs them on the CPU, behind the interface of ``patchreg.ops.cuda.launch``."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from patchreg.ops.cuda.launch import Argument, Size
from patchreg.ops.cuda.sources import read_sources, source_folders

_HERE = Path(__file__).parent
_HEADERS = ("cuda_on_cpu.h", "cuda_words.h", "fibers.h", "guarded_memory.h", "request.h")
_FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-gdwarf-4", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-w"),
    *("-fvisibility=hidden", "-fno-gnu-unique"),  # every library has an emulation of its own
    # A trap at the instruction, which becomes an error that names the line; no library of the sanitizer is needed.
    *("-fsanitize=undefined", "-fsanitize=bounds-strict", "-fno-sanitize=vptr", "-fsanitize-undefined-trap-on-error"),
)
_LARGEST_RELATIVE_DIFFERENCE = 1e-5  # between two orders of float atomics, as an L2 norm
_TENSOR, _NONE, _INTEGER, _REAL = range(4)


class EmulationError(AssertionError):
    """A launch that a device would refuse, or on which it would crash, hang or give a result that depends on luck."""


class _Argument(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("region", ctypes.c_int),
        ("offset", ctypes.c_longlong),
        ("integer", ctypes.c_longlong),
        ("real", ctypes.c_double),
    )


class _Region(ctypes.Structure):
    _fields_ = (("original", ctypes.c_void_p), ("result", ctypes.c_void_p), ("bytes", ctypes.c_longlong))


class _Request(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_longlong),
        ("descending", ctypes.c_int),
        ("argument_count", ctypes.c_int),
        ("region_count", ctypes.c_int),
        ("float_atomics", ctypes.c_int),
        ("arguments", ctypes.POINTER(_Argument)),
        ("regions", ctypes.POINTER(_Region)),
        ("fault_offset", ctypes.c_longlong),
        ("error", ctypes.c_char * 512),
    )


@dataclass(frozen=True)
class Launched:
    """What was launched."""

    source: str
    entry: str
    grid: Size
    block: Size
    shared: int


def why_not() -> str | None:
    """Why kernels cannot be emulated on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return "the emulation of CUDA measures shared memory in a way that only Linux has"
    if shutil.which("g++") is None:
        return "the emulation of CUDA needs g++"
    return None


@dataclass
class Emulator:
    """Runs every launch twice, with the threads in ascending and in descending order, and compares.

    Args:
        folder: where compiled kernels are kept.
    """

    folder: Path
    launches: list[Launched] = field(default_factory=list)

    def launch(
        self,
        source: str | Path,
        entry: str,
        grid: Size,
        block: Size,
        arguments: Sequence[Argument],
        shared: int = 0,
    ) -> None:
        """See :func:`patchreg.ops.cuda.launch.launch`.

        Raises:
            EmulationError: see there.
        """
        self.launches.append(Launched(Path(source).name, entry, grid, block, shared))
        library = _build(str(source), entry, self.folder)
        name = f"{entry} of {Path(source).name}"
        memory = _Memory.of(arguments)
        runs = [_run(library, name, memory, grid, block, shared, descending) for descending in (False, True)]
        for argument in range(len(arguments)):
            _compare(name, argument, arguments[argument], memory, runs)
        for region, result in zip(memory.regions, runs[0].results, strict=True):
            ctypes.memmove(region[0], result.data_ptr(), region[1])


@dataclass(frozen=True)
class _Memory:
    """The arguments, and the pieces of memory that they lie in: tensors that overlap share one."""

    arguments: list[_Argument]
    regions: list[tuple[int, int]]

    @classmethod
    def of(cls, arguments: Sequence[Argument]) -> _Memory:
        spans = sorted({_span(each) for each in arguments if isinstance(each, Tensor)})
        regions: list[tuple[int, int]] = []
        for start, size in spans:
            if regions and start < sum(regions[-1]):
                regions[-1] = (regions[-1][0], max(sum(regions[-1]), start + size) - regions[-1][0])
            else:
                regions.append((start, size))
        return cls([_describe(each, regions) for each in arguments], regions)


def _span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def _describe(argument: Argument, regions: list[tuple[int, int]]) -> _Argument:
    if argument is None:
        return _Argument(kind=_NONE)
    if isinstance(argument, Tensor):
        start, _ = _span(argument)
        region = max(i for i, (first, _) in enumerate(regions) if first <= start)  # they are in order
        return _Argument(kind=_TENSOR, region=region, offset=start - regions[region][0])
    if isinstance(argument, int):
        return _Argument(kind=_INTEGER, integer=argument)
    return _Argument(kind=_REAL, real=argument)


@dataclass(frozen=True)
class _Run:
    results: list[Tensor]
    float_atomics: bool


def _run(library: str, name: str, memory: _Memory, grid: Size, block: Size, shared: int, descending: bool) -> _Run:
    results = [torch.empty(size, dtype=torch.uint8) for _, size in memory.regions]
    regions = [
        _Region(start, result.data_ptr(), size) for (start, size), result in zip(memory.regions, results, strict=True)
    ]
    request = _Request(
        grid=grid,
        block=block,
        shared=shared,
        descending=descending,
        argument_count=len(memory.arguments),
        region_count=len(regions),
        arguments=(_Argument * max(1, len(memory.arguments)))(*memory.arguments),
        regions=(_Region * max(1, len(regions)))(*regions),
    )
    _load(library)(ctypes.byref(request))
    if request.error:
        raise EmulationError(f"{name}: {request.error.decode()}{_line(library, request.fault_offset)}")
    return _Run(results, bool(request.float_atomics))


def _compare(name: str, position: int, argument: Argument, memory: _Memory, runs: list[_Run]) -> None:
    """Raise where an argument's content depends on the order of the threads."""
    if not isinstance(argument, Tensor):
        return
    place, size = memory.arguments[position], argument.numel() * argument.element_size()
    ascending, descending = (run.results[place.region][place.offset : place.offset + size] for run in runs)
    if torch.equal(ascending, descending):
        return
    if runs[0].float_atomics and argument.is_floating_point():
        first, second = (each.clone().view(argument.dtype).double() for each in (ascending, descending))
        difference = (first - second).nan_to_num(0, 0, 0)
        same_nan = torch.equal(first.isfinite(), second.isfinite())
        if same_nan and difference.norm() <= _LARGEST_RELATIVE_DIFFERENCE * first.nan_to_num(0, 0, 0).norm():
            return
    raise EmulationError(f"{name}: argument {position} depends on the order of the threads: a barrier is missing")


@functools.cache
def _load(library: str) -> ctypes._CFuncPtr:
    function = ctypes.CDLL(library).patchreg_emulate
    function.restype = None
    return function


@functools.cache
def _build(source: str, entry: str, folder: Path) -> str:
    """The shared library of one kernel; compiled once for one text."""
    texts = read_sources(source)
    headers = {name: (_HERE / name).read_text() for name in _HEADERS}
    identity = hashlib.sha256(repr((texts, headers, entry, _FLAGS)).encode()).hexdigest()[:40]
    library = folder / f"{identity}.so"
    if library.exists():
        return str(library)
    folder.mkdir(parents=True, exist_ok=True)
    path = Path(source) if Path(source).is_absolute() else source_folders()[0] / source
    wrapper, partial = (folder / f"{identity}.{os.getpid()}.{ending}" for ending in ("cpp", "so"))
    wrapper.write_text(
        f'#include "cuda_on_cpu.h"\n#include "{path}"\n'
        f'extern "C" __attribute__((visibility("default"))) void patchreg_emulate(emulation::Request* request) {{ emulation::emulate({entry}, *request); }}\n'
    )
    includes = [f"-I{each}" for each in (_HERE, *source_folders())]
    command = ["g++", *_FLAGS, *includes, str(wrapper), "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wrapper.unlink()
    if done.returncode != 0:
        raise EmulationError(f"g++ cannot compile {entry} of {path.name}:\n{done.stderr}")
    os.replace(partial, library)
    return str(library)


def _line(library: str, offset: int) -> str:
    """Where in the text an instruction comes from, as far as addr2line knows."""
    if offset < 0 or shutil.which("addr2line") is None:
        return ""
    command = ["addr2line", "-C", "-f", "-i", "-e", library, hex(offset)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
    places = [Path(each).name for each in lines[1::2] if ":" in each and "?" not in each]
    return f", in {' called from '.join(places)}" if places else ""
