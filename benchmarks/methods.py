"""Every compression method on the real model, at equal bytes: perplexity, agreement, size, speed, time.

    python benchmarks/methods.py [--budgets 0.9 0.8 0.6] [--methods svd svd_llm ...] [--json FILE] [--resume]

Each row is a model that was saved, loaded with plain transformers and measured on held-out windows; rows that FILE
already holds are kept with --resume.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import eckart
from eckart.checkpoint.source import resolve
from eckart.evaluation import Machine, evaluate, heldout_tokens
from eckart.registry import entries

NOT_FOR_THIS = {
    "afm": "its embedding part needs a table that is not tied to a head; on linears it is lord",
    "discquant": "distils the whole model, which takes hours",
    "submoe": "merges experts, and there are none",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--budgets", nargs="+", default=["0.9", "0.8", "0.6"])
    parser.add_argument(
        "--methods", nargs="+", default=[e.key for e in entries("compression") if e.key not in NOT_FOR_THIS]
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 512 tokens")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/methods.json"))
    parser.add_argument("--work", type=Path, help="keep the models here")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--fast", action="store_true", help="perplexity only: no agreement, no timing")
    a = parser.parse_args()

    source = resolve(a.model)
    tokens, text = heldout_tokens(source.folder, samples=a.windows)
    machine = Machine.measure()
    rows: list[dict[str, Any]] = json.loads(a.json.read_text())["rows"] if a.resume and a.json.exists() else []
    work = a.work or Path(tempfile.mkdtemp(prefix="eckart-methods-"))
    work.mkdir(parents=True, exist_ok=True)
    done = {(r["method"], r["budget"]) for r in rows}
    console = Console()

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        a.json.parent.mkdir(parents=True, exist_ok=True)
        a.json.write_text(json.dumps({"text": text, "samples": a.samples, "rows": rows}, indent=1) + "\n")
        console.print(show(rows, text))

    def measure(model: Path, against: Path | None) -> dict[str, Any]:
        other = None if a.fast else against
        return figures(evaluate(model, other, tokens=tokens, machine=machine, speed=not a.fast))

    if ("original", "1") not in done:
        keep({"method": "original", "budget": "1", **measure(source.folder, None)})
    for budget in a.budgets:
        for key in a.methods:
            if (key, budget) in done:
                continue
            out = work / f"{key}-{budget}"
            begin = time.perf_counter()
            try:
                eckart.compress_to(
                    out, source, key, budget=budget, samples=a.samples, statistics=work / "statistics", overwrite=True
                )
            except ValueError as e:
                keep({"method": key, "budget": budget, "error": str(e)})
                continue
            seconds = time.perf_counter() - begin
            keep({"method": key, "budget": budget, "seconds": seconds, **measure(out, source.folder)})
            if a.work is None:
                shutil.rmtree(out)
    console.print(show(rows, text))


def figures(found: Any) -> dict[str, Any]:
    """The columns of one row."""
    keys = ("bytes_disk", "perplexity", "kl", "top1_agreement", "prefill_tokens_per_second", "decode_tokens_per_second")
    return {key: getattr(found, key) for key in keys}


def show(rows: list[dict[str, Any]], text: str) -> Table:
    table = Table(title=f"SmolLM2-135M-Instruct, float16; {text}", title_justify="left")
    for name in (
        "budget",
        "method",
        "MB on disk",
        "perplexity",
        "KL",
        "top-1 agreement",
        "prefill tok/s",
        "decode tok/s",
        "seconds",
    ):
        table.add_column(name, justify="left" if name in ("budget", "method") else "right")
    for r in rows:
        if "error" in r:
            table.add_row(r["budget"], r["method"], "-", "cannot meet it", *[""] * 5)
            continue
        table.add_row(
            r["budget"], r["method"], f"{r['bytes_disk'] / 1e6:.1f}", f"{r['perplexity']:.4g}",
            "-" if r["kl"] is None else f"{r['kl']:.3f}",
            "-" if r["top1_agreement"] is None else f"{100 * r['top1_agreement']:.1f}%",
            "-" if r["prefill_tokens_per_second"] is None else f"{r['prefill_tokens_per_second']:.0f}",
            "-" if r["decode_tokens_per_second"] is None else f"{r['decode_tokens_per_second']:.1f}",
            f"{r['seconds']:.0f}" if "seconds" in r else "-",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
