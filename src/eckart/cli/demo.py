"""The demo: the same model and budget, several methods, one table and one page."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from eckart.checkpoint.source import Source, resolve
from eckart.cli.console import Bars, megabytes, number, out, table
from eckart.compression import compress_to
from eckart.evaluation import Evaluation, Machine, evaluate, heldout_tokens
from eckart.jobs import Result
from eckart.jobs.card import remember_evaluation
from eckart.report import comparison_report, model_report

METHODS = ("svd", "svd_llm", "auto")
HELDOUT = 6


def run_demo(folder: Path, model: str, budget: str, samples: int, keep: bool) -> None:
    """Compress `model` with each of METHODS at `budget` and print what came of it."""
    begin = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with Bars() as bars:
        source = resolve(model, progress=bars)
        tokens, text = heldout_tokens(str(source.folder), "builtin", samples=HELDOUT, progress=bars)
        machine = Machine.measure()
        original = evaluate(source.folder, tokens=tokens, text=text, machine=machine, progress=bars)
    rows = [_row("original", "1", original, None)]
    layers = {}
    for key in METHODS:
        with Bars(f"{key}: ") as bars:
            result, measured = _one(folder / key, source, key, budget, samples, keep, tokens, text, machine, bars)
        rows.append(_row(key, budget, measured, result))
        layers[key] = [layer.to_json() for layer in result.layers]
        model_report(folder / key)
    out.print(_table(rows, source.spec, budget))
    page = comparison_report(
        rows, folder / "report.html", title=f"{source.spec} at {budget} of its bytes",
        subtitle=f"{text}; {samples} calibration windows of 512 tokens. {source.note}", layers=layers,
    )  # fmt: skip
    out.print(f"report: [bold]{page.resolve()}[/]", soft_wrap=True)
    out.print(f"{time.perf_counter() - begin:.0f} seconds in all")


def _one(
    target: Path, source: Source, key: str, budget: str, samples: int, keep: bool, tokens: Any, text: str,
    machine: Machine, bars: Bars,
) -> tuple[Result, Evaluation]:  # fmt: skip
    if target.exists() and not keep:
        shutil.rmtree(target)
    result = compress_to(
        target, source, key, budget=budget, samples=samples, statistics=target.parent / "statistics", resume=keep,
        overwrite=True, progress=bars,
    )  # fmt: skip
    measured = evaluate(
        target, source.folder, tokens=tokens, text=text, machine=machine, time_original=False, progress=bars
    )
    remember_evaluation(target, measured.to_json())
    return result, measured


def _row(name: str, budget: str, measured: Evaluation, result: Result | None) -> dict[str, Any]:
    keys = (
        "bytes_disk", "perplexity", "kl", "top1_agreement", "prefill_tokens_per_second", "decode_tokens_per_second",
        "peak_memory",
    )  # fmt: skip
    found = {key: getattr(measured, key) for key in keys}
    own: dict[str, Any] = {"method": name, "budget": budget}
    if result is not None:
        own |= {"seconds": result.seconds.get("total"), "folder": str(result.folder)}
    return own | found


def _table(rows: list[dict[str, Any]], spec: str, budget: str) -> Any:
    columns = ["method", "on disk", "perplexity", "agreement", "prefill tok/s", "decode tok/s", "peak memory", "seconds"]  # fmt: skip # noqa: E501
    shown = [
        [
            r["method"], megabytes(r["bytes_disk"]), number(r["perplexity"]),
            "-" if r["top1_agreement"] is None else f"{100 * r['top1_agreement']:.1f}%",
            number(r["prefill_tokens_per_second"]), number(r["decode_tokens_per_second"], 3),
            megabytes(r["peak_memory"]), number(r.get("seconds"), 3),
        ]
        for r in rows
    ]  # fmt: skip
    return table(f"{spec} at {budget}", columns, shown)
