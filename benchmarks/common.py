"""What the benchmarks share: the machine, and results as JSON."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import patchreg

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Where and with what a benchmark ran."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
        ).stdout.strip()
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    return {
        "commit": commit,
        "patchreg": patchreg.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def write_results(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS, **settings: Any) -> Path:
    """Write a benchmark's rows as ``NAME.json`` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps({"benchmark": name, "settings": settings, "machine": machine(), "rows": rows}, indent=1) + "\n"
    )
    return path


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """The rows as a Markdown table."""

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)
