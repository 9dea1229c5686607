"""The account of ``patchreg memory`` as a table and sentences."""

from __future__ import annotations

import json
from typing import Any

GIB = 2**30
STAGES = "model.init_args.cascade.init_args."
"""Where a proposal's places begin; not printed."""


def print_report(found: dict[str, Any]) -> None:
    """Print what ``patchreg memory --json`` gives, for people."""
    from rich.console import Console
    from rich.table import Table

    from patchreg.training.estimate import KINDS

    image, device = found["image"], found["device"]
    console = Console()
    shape, spacing = (
        "x".join(map(str, image["shape"])),
        " x ".join(f"{s:.3g}" for s in dict.fromkeys(image["spacing_mm"])),
    )
    console.print(f"images {shape} at {spacing} mm ({image['source']})", highlight=False)
    if found["ranks"] > 1:
        console.print(f"each pair is shared by {found['ranks']} ranks; this is what one of them holds", highlight=False)
    console.print(
        f"batch size {found['batch_size']}, precision {found['precision']}, on a {device['kind'].upper()}\n",
        highlight=False,
    )
    columns = [found["training"], found["inference"]]
    table = Table("", "training step", "", "inference", "")
    table.columns[1].justify = table.columns[3].justify = "right"
    for kind in KINDS:
        sizes = [column["kinds"].get(kind, 0) for column in columns]
        if any(sizes):
            cells = [
                cell
                for size, column in zip(sizes, columns, strict=True)
                for cell in (_size(size) if size else "", _bar(size, column["total"]))
            ]
            table.add_row(kind, *cells)
    table.add_section()
    table.add_row("together", _size(columns[0]["total"]), "", _size(columns[1]["total"]), "")
    if found["training"]["host"]:
        table.add_row("host memory", _size(found["training"]["host"]), "", "", "")
    console.print(table)
    for line in _verdict(found):
        console.print(line, highlight=False, soft_wrap=True)


def _verdict(found: dict[str, Any]) -> list[str]:
    training, device = found["training"], found["device"]
    beyond = "the driver" if device["kind"] == "gpu" else "the process"
    needed = f"training needs {_size(training['needed'])} (a tenth more for what is not seen, half a GiB for {beyond})"
    whole, apart = found["inference"], found["inference_images_on_host"]
    lines = [f"registering a pair takes {_size(whole['total'])}"]
    if device["kind"] == "gpu":
        lines[0] += f"; with images and fields on the host {_size(apart['total'])}, and {_size(apart['host'])} there"
    if device["bytes"] is None:
        return [needed, *lines]
    lines.insert(0, f"{'FITS' if found['fits'] else 'DOES NOT FIT'} {_size(device['bytes'])}: {needed}")
    validation = found["validation"]["needed"]
    if validation > device["bytes"]:
        lines.append(
            f"VALIDATION DOES NOT FIT: it needs {_size(validation)}, with images and fields on the device; take smaller "
            "validation images, or leave it out (trainer.limit_val_batches: 0)"
        )
    if found["fits"]:
        return lines
    if not found["proposals"]:
        remedy = "take narrower networks, or patches (a stage's spacing in mm or 'whole', not 'image'); docs/memory.md has more"
        return [*lines, "", f"Nothing that was tried fits: {remedy}"]
    return [*lines, "", "What fits, the least change first (stages are counted from 0):", *_listed(found["proposals"])]


def _listed(proposals: list[dict[str, Any]]) -> list[str]:
    lines = []
    for number, proposal in enumerate(proposals, start=1):
        changes = {place.removeprefix(STAGES): value for place, value in proposal["changes"].items()}
        lines.append(f"{number}. needs {_size(proposal['training']['needed'])}")
        lines += [f"     {place}: {_yaml(value)}" for place, value in changes.items()]
        if "data.init_args.batch_size" in changes:
            lines.append("     (trainer.accumulate_grad_batches makes up for it)")
    return lines


def _yaml(value: Any) -> str:
    """A setting as it is written in a configuration."""
    return value if isinstance(value, str) else json.dumps(value)


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _bar(size: int, total: int, width: int = 16) -> str:
    """A bar for a part of a total, in eighths of a character."""
    eighths = round(8 * width * size / max(total, 1))
    return "█" * (eighths // 8) + ("" if eighths % 8 == 0 else " ▏▎▍▌▋▊▉"[eighths % 8])
