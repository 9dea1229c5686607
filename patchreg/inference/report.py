"""A page of pictures and figures of a registration."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchreg.visual import png, registration_figure

if TYPE_CHECKING:
    from patchreg.inference.registration import Registration

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 90em; padding: 0 1em; color: #222; }}
img {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
td, th {{ padding: 0.2em 1em 0.2em 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top; }}
details pre {{ background: #f6f6f6; padding: 1em; overflow: auto; }}
.note {{ color: #666; font-size: 90%; }}
</style></head><body>
<h1>{title}</h1>
{table}
<img alt="planes through both images before and after registration" src="data:image/png;base64,{picture}">
<p class="note">Planes of the world through the middle of the fixed image's content, whatever way the files are stored.
Red in the log-Jacobian: the moving image is larger there; blue: smaller; yellow: the map folds.
Uncertainty: how far overlapping patches of the last stage disagree. For research, not for clinical use.</p>
<details><summary>summary.json</summary><pre>{summary}</pre></details>
</body></html>
"""


def report_page(registration: Registration) -> str:
    """One HTML page that needs no other file."""
    r = registration
    figure = registration_figure(r.fixed.volume, r.moving.volume, r.initial, r.transform, r.content, r.uncertainty)
    title = f"{Path(r.moving.path).name} onto {Path(r.fixed.path).name}"
    return _PAGE.format(
        title=html.escape(title),
        table=_table(r.summary),
        picture=base64.b64encode(png(figure)).decode(),
        summary=html.escape(json.dumps(r.summary, indent=2)),
    )


def _table(summary: dict[str, Any]) -> str:
    similarity = summary["similarity"]
    rows = [
        (
            "Similarity (" + similarity["measure"] + ")",
            f"{similarity['before']:.3f} before, {similarity['affine']:.3f} affine, {similarity['after']:.3f} after",
        ),
        ("Folding", f"{summary['folding_percent']:.3f} % of voxels"),
        (
            "Model",
            f"{summary['model']['name']}, refined on this pair" if summary["refined"] else summary["model"]["name"],
        ),
        ("Time", f"{sum(summary['seconds'].values()):.1f} s on {summary['device']}"),
    ]
    cells = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"
