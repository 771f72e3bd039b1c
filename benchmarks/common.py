"""What the benchmarks share: the machine they ran on, tables, and JSON that is written row by row."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from eckart.files import whole

CPUINFO = Path("/proc/cpuinfo")

Score = tuple[float, float]
"""What a run is compared by; high is good. The second number tells apart what the first does not: classifiers that have
learned nothing are all as good as a constant answer, and their training losses say which way to go."""

FAILED: Score = (-math.inf, -math.inf)


def machine() -> dict[str, Any]:
    """Processor, cores, threads of torch, its version, and how busy the machine is (load average of one minute)."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": load(),
    }


def processor() -> str:
    """The processor's name, as the kernel tells it where it does."""
    lines = CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def load() -> float:
    """Processes that wanted to run over the last minute; this benchmark's own threads are among them."""
    return round(os.getloadavg()[0], 2)


def table(title: str, text: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table: columns of text, then columns of numbers."""
    made = Table(title=title, title_justify="left")
    for heading in text:
        made.add_column(heading)
    for heading in numbers:
        made.add_column(heading, justify="right")
    return made


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a decoder's blocks."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}


def search_options(doc: str | None, file: str, rates: Sequence[float], quick: str) -> argparse.ArgumentParser:
    """A parser that knows what all searches of a learning rate are told: where results lie, the grid, threads.

    Args:
        doc: of the benchmark.
        file: the name of its results, unless given.
        rates: its grid, unless given.
        quick: what `--quick` makes of it.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(file), help="the results, and where a run goes on")
    parser.add_argument("--rates", type=float, nargs="+", default=list(rates), help="the grid of learning rates")
    parser.add_argument("--threads", type=int, default=0, help="of torch; fewer than cores where others want them, too")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def search_chosen(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Console]:
    """What was asked for, the grid ascending (with `--quick`, its middle alone), and where to print."""
    a = parser.parse_args()
    a.rates.sort()
    if a.quick:
        a.rates = a.rates[len(a.rates) // 2 :][:1]
    if a.threads:
        torch.set_num_threads(a.threads)
    return a, Console(width=None if sys.stdout.isatty() else 160)


def next_rate(rates: Sequence[float], scores: Mapping[float, Any]) -> float | None:
    """Of a sorted grid, the rate to try next: the middle, then the neighbours of the best one; high scores are good."""
    if not scores:
        return rates[len(rates) // 2]
    best = rates.index(max(scores, key=scores.__getitem__))
    return next((lr for lr in rates[max(0, best - 1) : best + 2] if lr not in scores), None)


def at_edge(rates: Sequence[float], lr: float) -> str:
    """A star for a rate with nothing tried beyond it."""
    return "*" if len(rates) > 1 and lr in (min(rates), max(rates)) else ""


def searched(
    row: dict[str, Any], rates: Sequence[float], seeds: Sequence[int],
    run: Callable[[float, int, str], dict[str, Any]], score: Callable[[dict[str, Any]], Score],
    save: Callable[[], None],
) -> None:  # fmt: skip
    """Add the runs that a row lacks: of the rates on `validation` with seed 0, then of the best one's seeds on `test`.

    Args:
        row: its `sweep`, rate -> run, and its `runs`, seed -> run.
        rates: the grid, sorted.
        seeds: of the best rate.
        run: trains once, at a rate, with a seed, judged on a part.
        score: of a run, FAILED if it did.
        save: called after every run.
    """
    scores = {float(lr): score(found) for lr, found in row["sweep"].items()}
    while (lr := next_rate(rates, scores)) is not None:
        row["sweep"][str(lr)] = run(lr, 0, "validation")
        scores[lr] = score(row["sweep"][str(lr)])
        save()
    best = max(scores, key=scores.__getitem__)
    for seed in seeds:
        if str(seed) not in row["runs"] and scores[best] > FAILED:
            row["runs"][str(seed)] = run(best, seed, "test")
            save()


def accuracy_of(run: dict[str, Any]) -> Score:
    """The score of a classifier's run."""
    return (run["accuracy"], -run.get("loss", 0.0)) if "accuracy" in run else FAILED


def show_accuracies(report: dict[str, Any], title: str, console: Console, more: Sequence[str] = ()) -> None:
    """Print the rows that `searched` filled with runs of classifiers: means over the seeds, and what failed.

    Args:
        report: its runs have `lr`, and `accuracy`, `parameters` and `step` (seconds), or an `error`.
        title: of the table.
        console: to print on.
        more: names of other shares that runs have.
    """
    shown = table(title, ["method"], ["rate", "accuracy", "spread", *more, "parameters", "s/step"])
    failed = []
    for name, row in report["rows"].items():
        runs = [run for run in row["runs"].values() if "accuracy" in run]
        errors = {run["error"] for run in (*row["sweep"].values(), *row["runs"].values()) if "error" in run}
        failed += [f"{name}: {error}" for error in sorted(errors)]
        if not runs:
            shown.add_row(name, "-", "failed" if errors else "-")
            continue
        lr = runs[0]["lr"]
        shown.add_row(
            name, f"{lr:g}{at_edge(report['settings']['rates'], lr)}",
            f"{statistics.mean(run['accuracy'] for run in runs):.2%}",
            f"{statistics.pstdev(run['accuracy'] for run in runs):.2%}",
            *(f"{statistics.mean(run[key] for run in runs):.2%}" for key in more),
            f"{statistics.mean(run['parameters'] for run in runs):,.0f}",
            f"{statistics.median(run['step'] for run in runs):.3f}",
        )  # fmt: skip
    console.print(shown)
    console.print("* at the edge of the grid")
    for line in failed:
        console.print(line, markup=False)


def opened(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of the same settings that is there, to go on with, or a new one. Exits where the settings differ."""
    if not path.exists():
        return {"machine": machine(), "settings": settings, "rows": {}}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    differ = [k for k in settings if report["settings"].get(k) != settings[k]]
    if differ:
        raise SystemExit(f"{path} holds runs with other settings ({', '.join(differ)}): name another file")
    return report


def write_json(data: Any, path: Path) -> None:
    """Replace the file by `data`, all at once."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
