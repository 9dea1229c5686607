"""What the README says is true: `.ci/run` runs its two set-up commands, this runs and reads the rest."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

from patchreg.cli.main import main

README = (REPOSITORY / "README.md").read_text()


def shell_lines():
    blocks = re.findall(r"```sh\n(.+?)\n```", README, flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("patchreg ")]


def test_the_set_up_commands_are_what_ci_runs():
    command = [sys.executable, str(REPOSITORY / ".ci" / "readme_commands.py"), str(REPOSITORY / "README.md")]
    first, second = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert first.endswith(".venv/bin/patchreg demo -o demo")
    assert second.endswith(".venv/bin/pytest -q")
    run = (REPOSITORY / ".ci" / "run").read_text()
    assert "readme_commands.py" in run
    assert '"${commands[0]}"' in run
    assert '"${commands[1]}"' in run


def test_the_main_job(tmp_path, capsys):
    """``patchreg demo`` as the README has it, in this environment."""
    out = tmp_path / "demo"
    start = time.perf_counter()
    assert main(["demo", "-o", str(out)]) == 0
    assert time.perf_counter() - start < 300
    summary = json.loads((out / "summary.json").read_text())
    assert summary["folding_percent"] < 0.5
    said = capsys.readouterr().out
    before, affine, after = (float(x) for x in re.findall(r"0\.\d+", said)[:3])
    assert before < affine < after
    assert after > 0.6
    names = {p.name for p in out.iterdir()}
    assert {
        "fixed.nii.gz",
        "moving.nii.gz",
        "moved.nii.gz",
        "moved_labels.nii.gz",
        "transform.h5",
        "report.html",
    } <= names


@pytest.mark.parametrize("line", shell_lines())
def test_commands_exist_with_their_options(line, capsys):
    words = line.split()
    if words[1] in ("fit", "validate", "test", "predict"):
        assert (REPOSITORY / words[words.index("--config") + 1]).is_file()
        return
    with pytest.raises(SystemExit):
        main([words[1], "--help"])
    explained = capsys.readouterr().out
    for option in (w for w in words if w.startswith("-")):
        assert option in explained


def test_python_is_valid_and_uses_public_names():
    import patchreg

    for block in re.findall(r"```python\n(.+?)\n```", README, flags=re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "patchreg":
                assert node.attr in patchreg.__all__


def test_links_lead_somewhere():
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
