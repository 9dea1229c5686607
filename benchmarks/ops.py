"""The operations against everything else that computes the same: correctness first, then seconds, memory and bandwidth.

    python benchmarks/ops.py                                  this machine's CPU, every operation and size
    python benchmarks/ops.py --device cuda --out results      a GPU; writes results/ops_NAME.json within six minutes
    python benchmarks/ops_page.py                             docs/kernels.md from the committed results

An implementation whose value or gradient is wrong on a small volume is not timed. Each is given its time limit: what was
slow on a smaller volume is skipped on a larger one, and what takes longer than five seconds runs once. Everything runs in
this one process, in float32 (no TF32), on the same images: smooth tissue with texture before a background of zeros.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import re
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, table, write_results
from ops_cases import CASES, Case, Contender, Inputs, Pass
from ops_measure import available_bytes, copy_bandwidth, measure
from torch import Tensor

from patchreg.ops import cpu
from patchreg.types import Shape3

SIZES = ["96x96x96", "160x192x224", "256x256x256", "512x512x512"]
CHECKED: Shape3 = (31, 37, 29)
PILOT: Shape3 = (64, 64, 64)
OURS, REFERENCE = "patchreg", "patchreg, reference"
RIVAL_TOLERANCE = 1e-3


@dataclass
class Bench:
    """One run of the benchmark: where, within which limits, and what was found."""

    device: torch.device
    repeats: int
    seconds_each: float
    seconds_in_all: float
    started: float = field(default_factory=time.perf_counter)
    bandwidth: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    wrong: set[tuple[str, str]] = field(default_factory=set)
    history: dict[tuple[str, str, str], tuple[int, float, float]] = field(default_factory=dict)
    """Voxels, milliseconds and extra volumes of the last size, by case, contender and pass."""
    made: dict[Any, Inputs] = field(default_factory=dict)

    def inputs(self, case: Case, shape: Shape3) -> Inputs:
        """The case's inputs of that shape, kept until others are asked for."""
        key = (case.make, shape)
        if key not in self.made:
            self.made.clear()
            gc.collect()
            generator = torch.Generator(self.device).manual_seed(0)
            found = case.make(shape, generator)
            if case.shaped_like is not None:
                like = found[case.shaped_like]
                found["upstream"] = torch.rand(like.shape, generator=generator, device=self.device)
            self.made[key] = found
        return self.made[key]

    def check(self, case: Case, contender: Contender) -> None:
        """Compare value and gradients with the reference in float64; what is wrong is not timed."""
        if self.device.type not in contender.devices:
            why = f"runs on {', '.join(contender.devices)} only" if contender.devices else "not installed"
            self.checks.append({"case": case.name, "contender": contender.name, "note": why})
            return
        inputs = self.inputs(case, CHECKED)
        wanted = tuple(name for name in case.passes[-1].wanted if name not in contender.lacks)
        exact = run(partial(case.operation, backend="reference"), {n: t.double() for n, t in inputs.items()}, wanted)
        row: dict[str, Any] = {"case": case.name, "contender": contender.name, "same formula": contender.same}
        try:
            found = run(contender.function, contender.prepare(inputs), wanted)
            errors = relative_errors(found, exact) if contender.same else []
            finite = all(bool(torch.isfinite(t).all()) for t in found)
            allowed = case.tolerance if contender.name in (OURS, REFERENCE) else RIVAL_TOLERANCE
            if contender.name == REFERENCE:
                allowed *= 10
            right = finite and all(e <= allowed * (10 if k else 1) for k, e in enumerate(errors))
            row |= {"value error": errors[0] if errors else None, "gradient error": max(errors[1:], default=None)}
        except Exception as error:  # a rival may fail in any way; ours must not
            if contender.name in (OURS, REFERENCE):
                raise
            right = False
            row["note"] = one_line(error)
        row["right"] = right
        self.checks.append(row)
        if not right:
            self.wrong.add((case.name, contender.name))

    def time(self, case: Case, contender: Contender, shape: Shape3, each: Pass) -> None:
        """Time one pass of one contender at one size, and keep the row."""
        if self.device.type not in contender.devices:
            return
        key, voxels = (case.name, contender.name, each.name), shape[0] * shape[1] * shape[2]
        row = {"op": case.op, "case": case.name, "size": "x".join(map(str, shape)), "pass": each.name}
        row["contender"] = contender.name
        note = self.why_not(case, contender, each, voxels)
        if note is None:
            try:
                found = self.measured(case, contender, shape, each, voxels)
                self.history[key] = (voxels, found["ms"], found["extra volumes"] or 0.0)
                row |= found
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if contender.name == OURS and not isinstance(error, torch.OutOfMemoryError):
                    raise
                note = one_line(error)
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        if note is not None:
            row["note"] = note
        if shape != PILOT:
            self.rows.append(row)
            shown = note or f"{row['ms']:10.2f} ms"
            print(f"{row['size']:>12}  {case.name:28} {each.name:44} {contender.name:40} {shown}", flush=True)

    def measured(self, case: Case, contender: Contender, shape: Shape3, each: Pass, voxels: int) -> dict[str, Any]:
        inputs = contender.prepare(self.inputs(case, shape))
        timing = measure(partial(run, contender.function, inputs, each.wanted), self.device, self.repeats)
        volume, bound = 4 * voxels, 4e3 * each.volumes * voxels / self.bandwidth
        extra = None if timing.extra_bytes is None else round(timing.extra_bytes / volume, 3)
        return {
            "ms": timing.median,
            "ms least": min(timing.runs),
            "ms most": max(timing.runs),
            "runs": len(timing.runs),
            "extra volumes": extra,
            "times the bandwidth limit": timing.median / bound,
        }

    def why_not(self, case: Case, contender: Contender, each: Pass, voxels: int) -> str | None:
        """Why this is not run, or None."""
        if set(each.wanted) & set(contender.lacks):
            return "has no such gradient"
        if (case.name, contender.name) in self.wrong:
            return "wrong on the small volume"
        if time.perf_counter() - self.started > self.seconds_in_all:
            return "the time for all had run out"
        known = self.history.get((case.name, contender.name, each.name))
        if known is None:
            return None
        seconds, extra = known[1] * 1e-3 * voxels / known[0], 4 * known[2] * voxels
        if seconds > self.seconds_each:
            return f"would take about {seconds:.0f} s"
        if extra > 0.8 * available_bytes(self.device):
            return f"would need about {extra / 2**30:.0f} GiB more"
        return None


def run(function: Any, inputs: Inputs, wanted: tuple[str, ...]) -> list[Tensor]:
    """The value, and its gradients to the inputs that are wanted."""
    given = {name: t.detach().requires_grad_(name in wanted) for name, t in inputs.items() if name != "upstream"}
    with torch.set_grad_enabled(bool(wanted)):
        value = function(**given)
    if not wanted:
        return [value]
    upstream = inputs.get("upstream")
    return [value.detach(), *torch.autograd.grad(value, [given[name] for name in wanted], upstream)]


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Of the value, and of the gradients that have our layout."""
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if a.shape == b.shape]
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def one_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {text[:120]}"


def contenders_of(case: Case) -> list[Contender]:
    ours = Contender(OURS, partial(case.operation, backend="native"))
    reference = Contender(REFERENCE, partial(case.operation, backend="reference"))
    return [ours, reference, *case.rivals()]


def compare_with_ours(rows: list[dict[str, Any]]) -> None:
    """Add how many times as long as ours everything takes."""
    ours = {(r["case"], r["size"], r["pass"]): r["ms"] for r in rows if r["contender"] == OURS and "ms" in r}
    for row in rows:
        mine = ours.get((row["case"], row["size"], row["pass"]))
        if mine is not None and "ms" in row:
            row["times ours"] = row["ms"] / mine


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="as 160x192x224, in ascending order")
    parser.add_argument("--ops", nargs="+", default=sorted({case.op for case in CASES}))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of the CPU; default: as many as torch takes")
    parser.add_argument("--time-limit", type=float, default=90, help="seconds for one run of one implementation")
    parser.add_argument("--total-limit", type=float, help="seconds after which nothing more is started; 300 on a GPU")
    parser.add_argument("--ours-only", action="store_true", help="leave the rivals out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    in_all = options.total_limit or (300 if options.device == "cuda" else float("inf"))
    bench = Bench(torch.device(options.device), options.repeats, options.time_limit, in_all)
    bench.bandwidth = copy_bandwidth(bench.device)
    print(f"copy bandwidth, read and written: {bench.bandwidth / 1e9:.1f} GB/s")
    sizes: list[Shape3] = [tuple(map(int, re.split("[x^]", size))) for size in options.sizes]  # type: ignore[misc]
    if sizes[0][0] * sizes[0][1] * sizes[0][2] > 100**3:
        sizes = [PILOT, *sizes]  # what would not fit, or take too long, shows on a small volume
    chosen = [(case, contenders_of(case)) for case in CASES if case.op in options.ops]
    if options.ours_only:
        chosen = [(case, found[:1]) for case, found in chosen]
    try:
        for case, found in chosen:
            for contender in found:
                bench.check(case, contender)
        print(table(bench.checks, ["case", "contender", "value error", "gradient error", "right", "note"]))
        for first, last in ((0, 1), (1, None)):  # ours at every size, then the others
            for shape in sizes:
                for case, found in chosen:
                    for contender in found[first:last]:
                        for each in case.passes:
                            bench.time(case, contender, shape, each)
    finally:  # what was measured is kept, whatever a rival did to the device
        compare_with_ours(bench.rows)
        print(write(bench, options))


def write(bench: Bench, options: argparse.Namespace) -> Path:
    """Write the results as JSON."""
    name = "cpu"
    if bench.device.type == "cuda":
        name = re.sub(r"\W+", "_", torch.cuda.get_device_name(bench.device)).strip("_").lower()
    extension = cpu.find_extension()
    packages = {
        p: importlib.util.find_spec(p) is not None for p in ("monai", "fireants", "fireants_fused_ops", "fused_lncc")
    }
    return write_results(
        f"ops_{name}",
        bench.rows,
        options.out,
        device=options.device,
        instruction_set=None if extension is None else extension.instruction_set(),
        copy_gb_per_second=round(bench.bandwidth / 1e9, 1),
        load_average=os.getloadavg()[0],
        seconds=round(time.perf_counter() - bench.started),
        seconds_each=options.time_limit,
        installed=packages,
        checks=bench.checks,
    )


if __name__ == "__main__":
    main()
