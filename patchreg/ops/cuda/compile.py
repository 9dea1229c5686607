"""CUDA C++ text compiled on the user's machine by NVRTC, which every CUDA build of torch brings along.

Neither a CUDA toolkit nor a host compiler is needed, and no driver either: only launching needs one. What was compiled
is kept on disk, so that it takes some hundred milliseconds once, and less than one from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import os
import sys
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from patchreg.errors import BackendUnavailable
from patchreg.ops.cuda.sources import read_sources

_log = logging.getLogger(__name__)

_MAGIC = b"patchreg kernel 1\n"


@dataclass(frozen=True)
class Binary:
    """One compiled kernel: what the driver loads, and the mangled name under which it finds the kernel."""

    code: bytes
    symbol: str

    def pack(self) -> bytes:
        """The content of a cache file: a checksum, then the symbol and the code."""
        body = self.symbol.encode() + b"\0" + self.code
        return _MAGIC + hashlib.sha256(body).digest() + body

    @classmethod
    def unpack(cls, content: bytes) -> Binary | None:
        """The kernel in a cache file, or None where the file is not whole."""
        checksum, body = content[len(_MAGIC) :][:32], content[len(_MAGIC) + 32 :]
        if not content.startswith(_MAGIC) or hashlib.sha256(body).digest() != checksum:
            return None
        symbol, _, code = body.partition(b"\0")
        return cls(code, symbol.decode())


def compile_kernel(source: str | Path, entry: str, architecture: int) -> Binary:
    """Compile one kernel, or take it from the cache.

    Args:
        source: a file of ``csrc/cuda`` (or the path of one elsewhere).
        entry: a kernel in it, with namespace and template arguments: ``"patchreg::warp_forward<float, true>"``.
        architecture: compute capability of the device, times ten: 90 for 9.0.

    Returns:
        A cubin, or PTX (text, for the driver to compile) where NVRTC is older than the device.

    Raises:
        BackendUnavailable: NVRTC is not installed, knows no target for the device, or refuses the text.
    """
    nvrtc = load_nvrtc()
    texts = read_sources(source)
    options = _options(nvrtc, architecture)
    identity = repr((_check(nvrtc, nvrtc.nvrtcVersion()), options, entry, texts))
    file = cache_folder() / f"sm_{architecture}" / f"{hashlib.sha256(identity.encode()).hexdigest()[:40]}.kernel"
    found = _read(file)
    if found is None:
        found = _compile(nvrtc, texts, entry, options)
        _write(file, found.pack())
    return found


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``PATCHREG_CACHE``, or the platform's folder for such files of this user."""
    chosen = os.environ.get("PATCHREG_CACHE")
    if chosen:
        return Path(chosen).expanduser() / "kernels"
    home = Path.home()
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        root = home / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return root / "patchreg" / "kernels"


def load_nvrtc() -> Any:
    """The module ``cuda.bindings.nvrtc``, with its library found.

    Raises:
        BackendUnavailable: it is not installed.
    """
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()  # finds and loads the library itself
    except (ImportError, OSError, RuntimeError) as error:  # what the bindings raise for a library not found varies
        raise BackendUnavailable(
            f"CUDA kernels are compiled by NVRTC, which is not installed ({error}): CUDA builds of torch>=2.11 bring it, "
            "otherwise run `pip install cuda-bindings nvidia-cuda-nvrtc`"
        ) from error
    return nvrtc


def _options(nvrtc: Any, architecture: int) -> list[str]:
    known = [each for each in _check(nvrtc, nvrtc.nvrtcGetSupportedArchs()) if each <= architecture]
    if not known:
        raise BackendUnavailable(f"NVRTC has no target for compute capability {architecture / 10}")
    # A cubin runs on its own major version and an equal or higher minor one; PTX on everything newer.
    form = "sm" if known[-1] // 10 == architecture // 10 else "compute"
    return [
        f"--gpu-architecture={form}_{known[-1]}",
        "--std=c++17",
        "--fmad=true",
        "--device-as-default-execution-space",
    ]


def _compile(nvrtc: Any, texts: dict[str, str], entry: str, options: list[str]) -> Binary:
    name, *headers = texts
    program = _check(
        nvrtc,
        nvrtc.nvrtcCreateProgram(
            texts[name].encode(),
            name.encode(),
            len(headers),
            [texts[header].encode() for header in headers],
            [header.encode() for header in headers],
        ),
    )
    try:
        _check(nvrtc, nvrtc.nvrtcAddNameExpression(program, entry.encode()))
        status = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0]
        if int(status) != 0:
            log = _text(nvrtc, program, "ProgramLog").rstrip(b"\0 \n").decode(errors="replace")
            raise BackendUnavailable(f"NVRTC could not compile {entry} of {name} with {' '.join(options)}:\n{log}")
        symbol = _check(nvrtc, nvrtc.nvrtcGetLoweredName(program, entry.encode())).decode()
        return Binary(_text(nvrtc, program, "CUBIN" if "=sm_" in options[0] else "PTX"), symbol)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(nvrtc: Any, program: Any, what: str) -> bytes:
    buffer = b" " * _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))  # the bindings write into the bytes in place
    return buffer


def _check(nvrtc: Any, returned: tuple[Any, ...]) -> Any:
    status, *values = returned
    if int(status) != 0:
        raise BackendUnavailable(f"NVRTC failed: {_check(nvrtc, nvrtc.nvrtcGetErrorString(status)).decode()}")
    return values[0] if len(values) == 1 else tuple(values)


def _read(file: Path) -> Binary | None:
    try:
        found = Binary.unpack(file.read_bytes())
    except OSError:
        return None
    if found is None:
        _log.warning("the cached kernel %s is damaged: compiling it again", file)
    return found


def _write(file: Path, content: bytes) -> None:
    """Keep a kernel for the next process, which never sees half a file; several may write the same one at once."""
    partial = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, file)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        _warn_unwritable(str(file.parent), error.strerror or str(error))


@cache
def _warn_unwritable(folder: str, reason: str) -> None:
    _log.warning(
        "compiled kernels cannot be kept in %s (%s), so that every process compiles them again: "
        "set PATCHREG_CACHE to a folder that can be written",
        folder,
        reason,
    )
