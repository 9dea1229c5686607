"""docs/kernels.md from the committed results of benchmarks/ops.py.

python benchmarks/ops_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"
Row = dict[str, Any]
OURS = "patchreg"

HEAD = """\
# The fused operations

`python benchmarks/ops_page.py` makes this page from the results that `benchmarks/ops.py` wrote to `benchmarks/results/`.

Registration is bound by memory traffic: what costs time is how often a volume is read and written. So each operation is
one kernel that reads its images once in each direction and keeps as little as it can: C++ for the CPU (the wheel has it
for three instruction sets, and takes the best at run time) and CUDA C++ for NVIDIA GPUs, which is compiled on first use
and kept. Gradients are exact. Where no kernel can run, plain PyTorch does the same (`backend="reference"`).

| operation | computes | gradient to | memory beyond its result and the gradients, in volumes |
|---|---|---|---|
| `lncc` | squared local normalised cross correlation over a cubic or Gaussian window | either image or both | value alone: none. With a gradient: one kept for each image that gets one, or none with `memory="recompute"` |
| `mutual_information` | mutual information of a joint Parzen histogram, or its normalised form | either image or both | none: the histogram, `bins^2` numbers |
| `warp` | `image(A x + t + S u(x))`; the identity grid is never made | image, displacement, affine map | none |
| `compose` | the displacement of "`v` first, then `u`" | both fields | none |
| `integrate` | scaling and squaring of a velocity, through `compose` | the velocity | two fields |

A volume is one float32 image. Mutual information is the same to the last bit on every run, for any number of threads and
on a GPU: counts are added in a fixed order, or as integers.

## Check it on your machine

```sh
patchreg kernels            # which kernels are active here, and why not where they are not
patchreg kernels --check    # compile them, run every operation in every variant, and compare with float64
python benchmarks/ops.py    # these tables; --device cuda for a GPU
```

## How it was measured

Correctness first: every implementation runs on a volume of 31x37x29 voxels, and what differs from float64 is not timed.
Then each runs on the same images in one process, float32 throughout; seconds are the median (least to most). Slow ones run
once, and are skipped where they would take longer than the limit. The mutual information of MONAI and FireANTs has windows
of its own, so that its value is not compared. *Extra volumes* is the most memory held beyond the
inputs, the results and gradients included. *Limit* is how many times longer it takes than copying at the bandwidth of a
large copy in the same run would, for the volumes that must be read and written at least: inputs and results once in
either direction.
"""


def main() -> None:
    PAGE.write_text(page(sorted(RESULTS.glob("ops_*.json"))))
    print(PAGE)


def page(files: list[Path]) -> str:
    """The whole page, of the results in ``files``."""
    parts = [HEAD]
    for file in files:
        parts.append(machine_part(json.loads(file.read_text()), file.name))
    if not any("ops_cpu" not in file.name for file in files):
        parts.append("## On a GPU\n\nNot measured yet.\n")
    return "\n".join(parts)


def machine_part(result: Row, name: str) -> str:
    """What one machine gave."""
    machine, settings, rows = result["machine"], result["settings"], result["rows"]
    on = machine["gpu"] if settings["device"] == "cuda" else f"{machine['processor']}, {machine['threads']} threads"
    facts = [f"torch {machine['torch']}", f"copies {settings['copy_gb_per_second']} GB/s"]
    if settings["device"] == "cpu":
        facts.append(f"{settings['instruction_set']} instructions")
    lines = [f"## {on}", "", f"{', '.join(facts)}; commit {machine['commit']} (`benchmarks/results/{name}`).", ""]
    lines += accuracy(settings["checks"])
    for case in dict.fromkeys(row["case"] for row in rows):
        lines += case_part(case, [row for row in rows if row["case"] == case])
    lines += losses(rows)
    lines += absent(settings["checks"])
    return "\n".join(lines) + "\n"


def accuracy(checks: list[Row]) -> list[str]:
    """Errors of ours against float64."""
    lines = ["| relative error in float32 | value | gradients |", "|---|---|---|"]
    lines += [
        f"| {check['case']} | {check['value error']:.0e} | {check['gradient error']:.0e} |"
        for check in checks
        if check["contender"] == OURS
    ]
    return [*lines, ""]


def case_part(case: str, rows: list[Row]) -> list[str]:
    """A table for each operation and variant."""
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    lines = [
        f"### {case}",
        "",
        "Milliseconds, and how many times as long as ours; the last two columns are of the last pass.",
        "",
    ]
    lines += ["| size | | " + " | ".join(passes) + " | extra volumes | limit |", "|---" * (len(passes) + 4) + "|"]
    places = dict.fromkeys((row["size"], row["contender"]) for row in rows)
    for size in dict.fromkeys(size for size, _ in places):
        for contender in [c for s, c in places if s == size]:
            mine = {row["pass"]: row for row in rows if (row["size"], row["contender"]) == (size, contender)}
            if all("ms" not in row for row in mine.values()) and len({row.get("note") for row in mine.values()}) == 1:
                shown = [next(iter(mine.values()))["note"], *[""] * (len(passes) + 1)]
            else:
                last = mine.get(passes[-1], {})
                shown = [*(cell(mine.get(name, {})) for name in passes), *(number(last, k) for k in LAST)]
            bold = f"**{contender}**" if contender == OURS else contender
            lines.append(f"| {size} | {bold} | " + " | ".join(shown) + " |")
    return [*lines, ""]


LAST = ("extra volumes", "times the bandwidth limit")


def cell(row: Row) -> str:
    """Milliseconds with their spread, and the ratio."""
    if "ms" not in row:
        return str(row.get("note", ""))
    shown = digits(row["ms"])
    if row["runs"] > 1:
        shown += f" ({digits(row['ms least'])} to {digits(row['ms most'])})"
    ratio = row.get("times ours")
    return shown if ratio is None or row["contender"] == OURS else f"{shown}, {digits(ratio)}x"


def number(row: Row, name: str) -> str:
    return "" if row.get(name) is None else digits(row[name])


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def losses(rows: list[Row]) -> list[str]:
    """Where something else was faster or took less memory."""
    ours = {(row["case"], row["size"], row["pass"]): row for row in rows if row["contender"] == OURS}
    lines = []
    for row in rows:
        mine = ours.get((row["case"], row["size"], row["pass"]), {})
        if row["contender"] == OURS or "ms" not in row or "ms" not in mine:
            continue
        where = f"- {row['case']}, {row['size']}, {row['pass']}: {row['contender']}"
        if row["ms"] < mine["ms"]:
            lines.append(f"{where} takes {digits(row['ms'])} ms, ours {digits(mine['ms'])} ms.")
        less = (
            None not in (row["extra volumes"], mine["extra volumes"])
            and row["extra volumes"] < mine["extra volumes"] - 0.1
        )
        if less:
            lines.append(f"{where} takes {number(row, LAST[0])} volumes, ours {number(mine, LAST[0])}.")
    return ["### Where something else is better", "", *(lines or ["Nowhere in these tables."]), ""]


def absent(checks: list[Row]) -> list[str]:
    """What was not compared, and why."""
    lines = [
        f"- {check['case']}, {check['contender']}: {check.get('note') or 'wrong on the small volume' + errors(check)}."
        for check in checks
        if not check.get("right")
    ]
    return ["### Not compared", "", *lines, ""] if lines else []


def errors(check: Row) -> str:
    return f" (value {check['value error']:.0e}, gradient {check['gradient error']:.0e})"


if __name__ == "__main__":
    main()
