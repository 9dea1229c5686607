"""Every CUDA kernel is compiled for every architecture here, without a GPU; and the cache of compiled kernels."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import patchreg.ops
from patchreg.errors import BackendUnavailable
from patchreg.ops.cuda import compile as compiling
from patchreg.ops.cuda.sources import read_sources, source_folders

ARCHITECTURES = (80, 90, 100, 120)


def operations():
    """The operations that have CUDA kernels."""
    names = [each.name for each in pkgutil.iter_modules(patchreg.ops.__path__) if each.ispkg and each.name != "cuda"]
    return [name for name in names if (Path(patchreg.ops.__path__[0]) / name / "cuda.py").is_file()]


def entries(operation):
    return importlib.import_module(f"patchreg.ops.{operation}.cuda").ENTRIES


@pytest.fixture
def nvrtc():
    try:
        return compiling.load_nvrtc()
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(nvrtc, tmp_path, monkeypatch):
    """An empty cache of compiled kernels."""
    monkeypatch.setenv("PATCHREG_CACHE", str(tmp_path / "cache"))
    compiling._warn_unwritable.cache_clear()
    return tmp_path / "cache" / "kernels"


def probe(architecture=90):
    return compiling.compile_kernel("probe.cu", "patchreg::probe", architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("operation", operations())
def test_every_kernel_compiles(operation, architecture, nvrtc, emulation_folder, monkeypatch):
    monkeypatch.setenv("PATCHREG_CACHE", str(emulation_folder))  # what has not changed is not compiled again
    for source, entry in entries(operation):
        assert compiling.compile_kernel(source, entry, architecture).code.startswith(b"\x7fELF")


def test_every_kernel_of_every_source_is_among_the_entries():
    named = {(source, re.match(r"[\w:]+", entry)[0]) for name in operations() for source, entry in entries(name)}
    named.add(("probe.cu", "patchreg::probe"))
    found = set()
    for path in source_folders()[0].glob("*.cu"):
        for match in re.finditer(
            r"__global__[^;{]*?\bvoid\b.*?\b(\w+)\((?=[\s\w*,]*\b(?:const|float|i64)\b)", path.read_text(), re.DOTALL
        ):
            found.add((path.name, f"patchreg::{match[1]}"))
    assert found == named


def test_sources_name_themselves_once():
    """Headers are handed to NVRTC by their file names alone."""
    names = [path.name for folder in source_folders() for path in folder.glob("*.h")]
    assert sorted(names) == sorted(set(names))


def test_sources_are_read_with_the_headers_that_they_include():
    assert next(iter(read_sources("lncc.cu"))) == "lncc.cu"
    assert {"lncc.cu", "lncc.h", "portable.h", "storage.h", "block.h"} <= set(read_sources("lncc.cu"))


def test_a_header_that_is_missing(tmp_path):
    (tmp_path / "lost.cu").write_text('#include "nowhere.h"\n')
    with pytest.raises(FileNotFoundError, match=r"lost.cu includes nowhere.h"):
        read_sources(tmp_path / "lost.cu")


def test_the_cache_is_used(cache, monkeypatch):
    first = probe()
    assert [file.suffix for file in (cache / "sm_90").iterdir()] == [".kernel"]  # and nothing unfinished
    monkeypatch.setattr(compiling, "_compile", None)
    assert probe() == first
    with pytest.raises(TypeError):
        probe(80)  # another architecture is another kernel


def test_other_text_is_another_kernel(cache, tmp_path):
    source, header = tmp_path / "own.cu", tmp_path / "own.h"
    source.write_text('#include "own.h"\n__global__ void own(float* out) { *out = VALUE; }\n')
    codes = []
    for value in ("1.0f", "2.0f"):
        header.write_text(f"#define VALUE {value}\n")
        codes.append(compiling.compile_kernel(source, "own", 90).code)
    assert codes[0] != codes[1]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-5], lambda b: b[:100] + b"!!" + b[102:], lambda b: b"", lambda b: b"x"]
)
def test_a_damaged_file_is_compiled_again(damage, cache, caplog):
    good = probe()
    (file,) = (cache / "sm_90").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert probe() == good
    assert "is damaged: compiling it again" in caplog.text
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written(cache, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PATCHREG_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert probe() == probe()
    assert caplog.text.count("compiled kernels cannot be kept") == 1


def test_text_that_does_not_compile(cache, tmp_path):
    (tmp_path / "wrong.cu").write_text("__global__ void wrong(float* out) { *out = undeclared; }\n")
    with pytest.raises(BackendUnavailable, match=r"(?s)wrong of wrong.cu with .*wrong.cu\(1\): error: .*undeclared"):
        compiling.compile_kernel(tmp_path / "wrong.cu", "wrong", 90)
    assert not cache.exists()


def test_devices_newer_than_nvrtc_get_ptx(cache):
    assert b".target sm_" in probe(architecture=9990).code


def test_devices_older_than_nvrtc_are_named(cache):
    with pytest.raises(BackendUnavailable, match=r"no target for compute capability 3.5"):
        probe(architecture=35)


def test_missing_nvrtc_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(BackendUnavailable, match=r"pip install cuda-bindings nvidia-cuda-nvrtc"):
        compiling.load_nvrtc()


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, "/home/me/.cache/patchreg/kernels"),
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/patchreg/kernels"),
        ("darwin", {}, "/home/me/Library/Caches/patchreg/kernels"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/patchreg/kernels"),
        ("linux", {"PATCHREG_CACHE": "/own"}, "/own/kernels"),
    ],
)
def test_where_the_cache_is(platform, environment, expected, monkeypatch):
    for name in ("PATCHREG_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert compiling.cache_folder() == Path(expected)


def test_importing_patchreg_loads_nothing_of_cuda():
    script = """
import sys, torch  # which may load them itself
before = set(sys.modules)
import patchreg.ops
print([name for name in set(sys.modules) - before if name.startswith("cuda")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
