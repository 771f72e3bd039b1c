"""The figures a reader looks for first, and what was promised beside what came out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from eckart.report import charts
from eckart.report.layers import Layer
from eckart.report.numbers import MISSING, duration, finite, percent, ratio, significant, size, times
from eckart.report.page import Cell, figure, table, tile
from eckart.report.provenance import part
from eckart.report.svg import bars

Record = Mapping[str, Any]


def headline(record: Record, evaluation: Record) -> str:
    """Eight tiles: bytes, perplexity, agreement, speed, and how near it runs to the machine's limits."""
    totals, original, machine = part(record, "totals"), part(evaluation, "original"), part(evaluation, "machine")
    before = totals.get("bytes_before") or original.get("bytes_disk")
    after = evaluation.get("bytes_disk") or totals.get("bytes_after")
    kind = str(evaluation.get("dtype") or MISSING)
    memory, memory_before = size(evaluation.get("bytes_memory")), size(original.get("bytes_memory"))
    peak_memory = size(evaluation.get("peak_memory"))
    tiles = [
        _tile("Size on disk", size(after), ("from", size(before)), ("", times(ratio(after, before)))),
        _tile("Weights in memory", memory, ("as", kind), ("from", memory_before), ("peak", peak_memory)),
        _tile(
            "Perplexity",
            significant(evaluation.get("perplexity")),
            ("±", significant(evaluation.get("perplexity_stderr"), 2)),
            ("from", significant(evaluation.get("perplexity_original"))),
            ("on", str(evaluation.get("text") or MISSING)),
        ),
        _tile(
            "Top-1 agreement",
            percent(evaluation.get("top1_agreement")),
            ("KL from the original, nats a token:", significant(evaluation.get("kl"))),
        ),
    ]
    for name, key in (("Decode", "decode_tokens_per_second"), ("Prefill", "prefill_tokens_per_second")):
        speed, old = evaluation.get(key), original.get(key)
        pieces = ("from", significant(old)), ("", times(ratio(speed, old)))
        tiles.append(_tile(f"{name}, tokens/s", significant(speed), *pieces))
    for name, key, limit, unit in (
        ("Decode, of memory bandwidth", "bandwidth_fraction", "bandwidth_gb_s", "GB/s"),
        ("Prefill, of arithmetic peak", "flops_fraction", "gflop_s", "GFLOP/s"),
    ):
        fraction, peak = finite(evaluation.get(key)), significant(machine.get(limit))
        piece = "this machine's limit:", peak if peak == MISSING else f"{peak} {unit}"
        tiles.append(_tile(name, percent(fraction), piece, meter=fraction))
    hint = '<p class="hint">Run <code>eckart evaluate</code> on this folder to measure the rest.</p>'
    return f'<div class="tiles">{"".join(tiles)}</div>{"" if evaluation else hint}'


def _tile(name: str, value: str, *pieces: tuple[str, str], meter: float | None = None) -> str:
    """A tile whose detail is the pieces (introduction, figure) that were measured."""
    known = [f"{introduction} {text}".strip() for introduction, text in pieces if text != MISSING]
    measured = value != MISSING
    return tile(name, value, ", ".join(known) if measured else "", measured=measured, meter=meter)


def predictions(record: Record, evaluation: Record, run: Record, layers: Sequence[Layer]) -> str:
    """A table of the plan's figures beside the measured ones, and the same for every layer's error as a plot."""
    totals, plan = part(record, "totals"), part(run, "predicted")
    rows: list[tuple[str, object, object, Callable[[object], str]]] = [
        ("Bytes on disk", totals.get("bytes_after"), evaluation.get("bytes_disk"), size),
        (
            "Relative error",
            _mean_error([layer.predicted for layer in layers]),
            _mean_error([layer.measured for layer in layers]),
            significant,
        ),
        ("Time", plan.get("seconds"), part(run, "seconds").get("total"), duration),
        ("Peak memory", plan.get("peak_memory"), run.get("peak_memory"), size),
    ]
    lines = []
    for name, predicted, measured, written in rows:
        factor = times(ratio(measured, predicted))
        drawing = _pair(finite(predicted), finite(measured))
        lines.append(
            [
                Cell(name, html=escape(name) + drawing),
                Cell(written(predicted)),
                Cell(written(measured)),
                Cell("–" if factor == MISSING else factor),
            ]
        )
    head = [("", ""), ("Predicted", ""), ("Measured", ""), ("Factor", "")]
    allowed = size(part(record, "budget").get("bytes"))
    left = figure(
        "The whole job",
        table(head, lines),
        lead="Grey predicted, blue measured." + ("" if allowed == MISSING else f" The budget allowed {allowed}."),
    )
    left = f'<div class="stack">{left}{_timing(run)}</div>'
    scatter = charts.error_scatter(layers)
    right = figure("Each layer's error", scatter, lead="On the dashed line it came as predicted.") if scatter else ""
    return f'<div class="grid2">{left}{right}</div>'


def _mean_error(errors: Sequence[float | None]) -> float | None:
    """The root of the mean relative squared error, layers counting alike; None where one of them lacks it."""
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known) / len(known)) if known and len(known) == len(errors) else None


def _pair(predicted: float | None, measured: float | None) -> str:
    highest = max(predicted or 0.0, measured or 0.0)
    if predicted is None or measured is None or highest <= 0:
        return ""
    lines = [f'<i style="width:{100 * max(value, 0.0) / highest:.1f}%"></i>' for value in (predicted, measured)]
    return f'<div class="pair">{"".join(lines)}</div>'


def _timing(run: Record) -> str:
    seconds = {str(name): value for name, value in part(run, "seconds").items() if finite(value) is not None}
    total = finite(seconds.pop("total", None))
    stages = [(name, float(value), duration(value)) for name, value in seconds.items()]
    rest = None if total is None else total - sum(value for _, value, _ in stages)
    if stages and rest is not None and total and rest > 0.005 * total:
        stages.append(("other", rest, duration(rest)))
    if not stages:
        return ""
    drawing = bars(stages, title="Seconds by stage")
    return figure("Time by stage", drawing, lead="" if total is None else f"{duration(total)} in all.")
