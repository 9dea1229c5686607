"""The compiled extension is there where it can be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from patchreg.ops import cpu


def test_the_extension_is_built_where_there_is_a_compiler():
    """An install whose build breaks falls back to PyTorch by design: this keeps the fall-back from passing unseen."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("there is no C++ compiler")
    extension = cpu.find_extension()
    assert extension is not None, "the build of patchreg._cpu failed: run pip install -v -e . and read what it says"
    assert extension.instruction_set() in ("baseline", "avx2", "avx512")
    with pytest.raises(ValueError, match="does not run"):
        extension.use_instruction_set("mmx")


def test_importing_patchreg_loads_no_cuda_library():
    script = "import sys, patchreg; print([m for m in sys.modules if m.startswith('cuda')])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
