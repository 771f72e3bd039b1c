"""Methods at equal bits per weight on real models in full precision: how much of each model is left.

    python benchmarks/quality.py [--models decoder minilm ...] [--methods nearest gptq ...] [--bits 2 2.5 3 4]
                                 [--allocation optimal()] [--whole] [--json FILE] [--resume] [--quick]

Rows are methods: those of `ROWS`, any other that is registered, one with a setting, such as `eora:rank=8`, or a form
given as text, such as 'quantized(group=32) + low_rank()', which is fitted in the metric `input_covariance()`. A column
is a budget, in bits for each weight of the linear layers within the blocks; everything that those layers take on disk
counts, down to the names of their tensors, and the rest of the model stays as it is, in float16. "bits" is what was
used of it. With `--whole`, bits are for each weight of the model, tables, heads and norms included: at 2 bits it is 16
times smaller than in float32. A method that leaves the tables alone then often cannot meet the budget, and its row says
so.

Every model is judged by its own task (tasks.py), in float32. Rows are written to the JSON file as they come, those
that failed with the error; `--resume` keeps what the file holds and tries the failed ones again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import eckart
from common import machine, table, write_json
from eckart.calibration.stream import Batch
from eckart.calibration.subject import InMemory, block_names
from eckart.checkpoint.layout import file_bytes
from eckart.jobs.engine import part_layouts
from eckart.jobs.recipe import Recipe
from eckart.registry import entries
from models import FOLDERS, load
from tasks import TASKS, Task

COVARIANCE = "input_covariance()"
ORIGINAL = "original"


@dataclass(frozen=True)
class Way:
    """What a row does: a registered method, or a form; and what replaces its own metric, allocation and targets."""

    method: str | None = None
    form: str | None = None
    metric: str | None = None
    allocation: str | None = None
    targets: str | None = None
    settings: dict[str, int] = field(default_factory=dict)


def codes(settings: str = "", more: str = "") -> str:
    """Codes of 1 to 8 bits in groups of 64, whichever the budget is better spent on."""
    return " | ".join(f"quantized(bits={bits}, group=64{settings}){more}" for bits in (1, 2, 3, 4, 5, 6, 8))


TABLES_TOO = r"(?!lm_head|proj_out).*"  # heads that share a table go with it
GPTQ, SEARCHED, LOW_RANK = ", rounding=gptq()", ", grid=uniform(search=20)", " + low_rank()"
ROWS = {
    "nearest": Way(form=codes(), allocation="optimal()"),
    "nearest, uniform": Way(form=codes(), allocation="uniform()"),
    "nearest, searched": Way(form=codes(SEARCHED), metric=COVARIANCE, allocation="optimal()"),
    "gptq rounding": Way(form=codes(GPTQ), metric=COVARIANCE, allocation="optimal()"),
    "gptq, searched": Way(form=codes(SEARCHED + GPTQ), metric=COVARIANCE, allocation="optimal()"),
    "nearest, rotated": Way(form=f"rotated({codes()})", allocation="optimal()"),
    "gptq, rotated": Way(form=f"rotated({codes(GPTQ)})", metric=COVARIANCE, allocation="optimal()"),
    "nearest, tables too": Way(form=codes(), allocation="optimal()", targets=TABLES_TOO),
    "gptq, tables too": Way(form=codes(GPTQ), metric=COVARIANCE, allocation="optimal()", targets=TABLES_TOO),
    "pvq, tables too": Way("pvq", targets=TABLES_TOO),
    "nearest + low rank": Way(form=codes(more=LOW_RANK), metric=COVARIANCE, allocation="optimal()"),
    "gptq + low rank": Way(form=codes(GPTQ, LOW_RANK), metric=COVARIANCE, allocation="optimal()"),
}
NOT_LOW_RANK = [e.key for e in entries("compression") if e.family not in ("low-rank", "width")]
USUAL = [*ROWS, *NOT_LOW_RANK, "svd_llm"]


def way_of(name: str, allocation: str | None) -> Way:
    """The row of this name. `allocation` replaces what a row does not fix."""
    if name in ROWS:
        return ROWS[name]
    if "(" in name:
        return Way(form=name, metric=COVARIANCE, allocation=allocation or "optimal()")
    method, _, settings = name.partition(":")
    pairs = (pair.split("=") for pair in settings.split(",") if pair)
    return Way(method=method, allocation=allocation, settings={key: int(value) for key, value in pairs})


@dataclass(frozen=True)
class Scale:
    """Bytes of a model, and of the layers that bits are counted on, in the dtype in which it is loaded."""

    total: int
    targeted: int
    weights: int
    all: int
    whole: bool = False

    @classmethod
    def of(cls, model: nn.Module, targets: str, whole: bool = False) -> Scale:
        subject, blocks = InMemory(model), block_names(model)
        names = [n for part in Recipe(targets=targets).sites(model, blocks).values() for n in part]
        layers: list[Any] = [model.get_submodule(name) for name in names]
        weights = sum(layer.weight.numel() for layer in layers)
        layouts = part_layouts(subject, blocks)
        total = sum(file_bytes(layout) for layout in layouts.values())
        shapes = (shape for layout in layouts.values() for _, shape in layout.values())
        everything = sum(torch.Size(shape).numel() for shape in shapes)
        return cls(total, weights * subject.storage_dtype.itemsize, weights, everything, whole)

    def budget(self, bits: float) -> str:
        """Bytes of the whole model, as `compress` reads them."""
        if self.whole:
            return f"{int(bits * self.all / 8)}B"
        return f"{int(self.total - self.targeted + bits * self.weights / 8)}B"

    def bits(self, nbytes: int) -> float:
        """For each weight, in a model of so many bytes."""
        return 8 * nbytes / self.all if self.whole else 8 * (nbytes - self.total + self.targeted) / self.weights


def one(task: Task, way: Way, bits: float, batches: list[Batch], whole: bool) -> dict[str, Any]:
    """Compress and measure; what goes wrong is part of the result."""
    model = load(task.model)
    scale = Scale.of(model, task.targets, whole)
    words = {k: v for k, v in asdict(way).items() if k not in ("method", "settings") and v is not None} | way.settings
    if task.targets and way.method != "auto":  # which has no targets, and takes the whole file
        words.setdefault("targets", task.targets)
    begin, cpu, row = time.perf_counter(), time.process_time(), dict[str, Any](way=asdict(way))
    try:
        result = eckart.compress(
            model, way.method, budget=scale.budget(bits), data=batches, seed=task.seed, **words
        ).result  # fmt: skip
        row |= {
            "seconds": round(time.perf_counter() - begin, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "used": scale.bits(result.bytes_after),
            "error_in_metric": result.totals()["measured_error"],
            "forms": dict(Counter(layer.form for layer in result.layers).most_common(8)),
        }
        return row | {"figures": task.measure(model.float())}
    except Exception as error:  # a method that fails is a row, whatever made it fail
        return row | {"error": f"{type(error).__name__}: {error}"}


def measure(arguments: argparse.Namespace, report: dict[str, Any], console: Console) -> None:
    """Add the rows that the report lacks."""
    s, rows = report["settings"], report["rows"]
    for name in arguments.models:
        have = {(r["method"], r["bits"]) for r in rows if r["model"] == name}
        todo = [(m, b) for b in arguments.bits for m in arguments.methods if (m, b) not in have]
        if not todo:
            continue
        with console.status(f"{name}: the original"):
            task = TASKS[name](name, s["samples"], s["length"], s["size"], seed=s["seed"])
            batches = task.calibration()
            if (ORIGINAL, 16.0) not in have:
                keep(report, {"model": name, "method": ORIGINAL, "bits": 16.0, "used": 16.0,
                              "figures": task.measure(load(name).float())}, arguments.json)  # fmt: skip
        for index, (method, bits) in enumerate(todo):
            with console.status(f"{name}: {method} at {bits:g} bits ({index + 1} of {len(todo)})"):
                row = {"model": name, "method": method, "bits": bits}
                row |= one(task, way_of(method, arguments.allocation), bits, batches, s["whole"])
            keep(report, row, arguments.json)
            console.print(f"{name}, {bits:g} bits, {method}: {said(row)}", markup=False)


def keep(report: dict[str, Any], row: dict[str, Any], path: Path | None) -> None:
    report["rows"].append(row)
    if path is not None:
        write_json(report, path)


def said(row: dict[str, Any]) -> str:
    """A row in one line."""
    if "error" in row:
        return row["error"]
    figures = (f"{key} {form.format(row['figures'][key])}" for key, form in TASKS[row["model"]].columns.items())
    return f"{row['used']:.3f} bits used, {', '.join(figures)}, {row.get('cpu_seconds', 0):.0f} CPU s"


def show(report: dict[str, Any], model: str, console: Console) -> None:
    """Print the rows of one model, and what went wrong below them."""
    s, columns = report["settings"], TASKS[model].columns
    of = "all weights" if s["whole"] else "linear layers"
    title = f"{model}; bits of {of}; {s['samples']} calibration windows of {s['length']} tokens, seed {s['seed']}"
    made = table(title, ["budget", "method"], ["bits", *columns, "CPU s"])
    rows = sorted((r for r in report["rows"] if r["model"] == model), key=lambda r: -r["bits"])
    for r in rows:
        if "error" in r:
            made.add_row(f"{r['bits']:g}", r["method"], "failed")
            continue
        figures = [form.format(r["figures"][key]) for key, form in columns.items()]
        seconds = f"{r['cpu_seconds']:.0f}" if "cpu_seconds" in r else "-"
        made.add_row(f"{r['bits']:g}", r["method"], f"{r['used']:.3f}", *figures, seconds)
    console.print(made)
    for r in rows:
        if "error" in r:
            console.print(f"{r['method']} at {r['bits']:g} bits: {r['error']}", markup=False)


def opened(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The report to go on with: a new one, or what the file holds without failed rows that are asked for again."""
    fresh: dict[str, Any] = {"settings": settings, "machine": machine(), "rows": []}
    if not (arguments.resume and arguments.json and arguments.json.exists()):
        return fresh
    report = json.loads(arguments.json.read_text(encoding="utf-8"))
    if report["settings"] != settings:
        raise SystemExit(f"{arguments.json} was measured with {report['settings']}, not {settings}: name another file")
    asked = {(m, n, b) for m in arguments.models for n in arguments.methods for b in arguments.bits}
    rows = [r for r in report["rows"] if "error" not in r or (r["model"], r["method"], r["bits"]) not in asked]
    return report | {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(FOLDERS), choices=list(FOLDERS))
    parser.add_argument("--methods", nargs="+", default=USUAL, help=f"default: {', '.join(USUAL)}")
    parser.add_argument("--bits", nargs="+", type=float, default=[4.0, 3.0, 2.5, 2.0])
    parser.add_argument("--allocation", help="for registered methods, in place of their own")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows (default 64)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument("--size", type=int, default=0, help="held-out windows, sentences, clips (default: the task's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", action="store_true", help="count the bits of all weights, not of the linear layers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows to this file as they come")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file holds, but try failed ones again")  # fmt: skip # noqa: E501
    parser.add_argument("--quick", action="store_true", help="decoder and minilm, 16 windows of 128 tokens")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.samples, arguments.length = 16, 128
        arguments.models = [m for m in arguments.models if m in ("decoder", "minilm")]
    torch.set_num_threads(arguments.threads)
    console = Console()
    report = opened(arguments, {key: getattr(arguments, key) for key in ("samples", "length", "size", "seed", "whole")})
    measure(arguments, report, console)
    for model in arguments.models:
        show(report, model, console)


if __name__ == "__main__":
    main()
