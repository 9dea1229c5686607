"""benchmarks/ops.py runs, and docs/kernels.md is what the committed results say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture
def ops_page(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ops_page

    return ops_page


def test_the_page_is_made_from_the_committed_results(ops_page):
    files = sorted((BENCHMARKS / "results").glob("ops_*.json"))
    assert files, "benchmarks/ops.py has not been run: its results belong in benchmarks/results"
    assert (REPOSITORY / "docs" / "kernels.md").read_text() == ops_page.page(files)


@pytest.mark.slow
def test_every_case_runs_and_the_rows_are_whole(ops_page, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "ops.py"), "--sizes", "12x13x14", "17x16x15", "--repeats", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "ops_cpu.json").read_text())
    rows = result["rows"]
    ours = [row for row in rows if row["contender"] == "patchreg"]
    assert {row["op"] for row in ours} == {"lncc", "mutual_information", "warp", "integrate"}
    assert {row["size"] for row in ours} == {"12x13x14", "17x16x15"}
    assert all(row["ms"] > 0 and row["times the bandwidth limit"] > 0 for row in ours)
    assert all("ms" in row or row["note"] for row in rows)
    checks = {(check["case"], check["contender"]): check for check in result["settings"]["checks"]}
    assert all(check["right"] for (_, contender), check in checks.items() if contender == "patchreg")
    assert checks["lncc window 9", "VoxelMorph's formula"]["right"]
    assert checks["warp", "affine_grid + grid_sample"]["right"]
    text = ops_page.page([tmp_path / "ops_cpu.json"])
    assert "### lncc window 9" in text
    assert "12x13x14 | **patchreg**" in text
