"""Figures against bytes: every run a point, every method a line, and the front that no other run beats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eckart.report.axis import Axis
from eckart.report.labels import Label, shorten, spread
from eckart.report.numbers import byte_unit, finite, significant, size, tick
from eckart.report.page import figure, legend
from eckart.report.svg import Chart, category, shape

ORIGINAL = "original"
NEAR = 50.0  # perplexities up to so many times the least get a plot of their own, if others squeeze them together

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One point: a method's figure at its size in bytes."""

    method: str
    bytes: float
    value: float


def method_of(row: Row) -> str:
    return str(row.get("method") or "unnamed")


def methods_of(rows: Iterable[Row]) -> list[str]:
    """The compared methods, in order of appearance."""
    return [method for method in dict.fromkeys(map(method_of, rows)) if method != ORIGINAL]


def runs_of(rows: Iterable[Row], key: str = "perplexity", *, log: bool = True) -> list[Run]:
    """The rows that have both a size and a finite figure (positive, for a logarithmic axis)."""
    runs = []
    for row in rows:
        weight, value = finite(row.get("bytes_disk")), finite(row.get(key))
        if weight is not None and weight >= 0 and value is not None and (value > 0 or not log):
            runs.append(Run(method_of(row), weight, value))
    return runs


def pareto_plot(rows: Sequence[Row]) -> str:
    """Perplexity against bytes, as HTML: the whole, and the runs near the best where others dwarf them."""
    runs, methods = runs_of(rows), methods_of(rows)
    if not runs:
        return ""
    least = min(run.value for run in runs)
    near = [run for run in runs if run.value <= NEAR * least]
    plots = [against_bytes(runs, methods, label="perplexity", title="Perplexity against bytes on disk", front=True)]
    if max(run.value for run in runs) > 20 * NEAR * least and len(near) > 2:
        close = against_bytes(near, methods, label="perplexity", title="Perplexity against bytes, near", front=True)
        plots = [
            figure("All runs", plots[0]),
            figure(f"Up to {NEAR:g} times the lowest perplexity", close),
        ]
    shown = {run.method for run in runs}
    key = [(shape(i, category(i)), method) for i, method in enumerate(methods) if method in shown]
    key += [(shape(0, "var(--ink)"), ORIGINAL)] if ORIGINAL in shown else []
    body = "".join(plots)
    return legend(key) + (f'<div class="grid2">{body}</div>' if len(plots) > 1 else body)


def against_bytes(
    runs: Sequence[Run],
    methods: Sequence[str],
    *,
    label: str,
    title: str,
    log: bool = True,
    front: bool = False,
    height: int = 380,
    written: Callable[[object], str] = significant,
    ticks: Callable[[float], str] = tick,
) -> str:
    """A chart of runs; a method's place in `methods` gives its colour and shape.

    `written` is how a figure reads in a tip, `ticks` how it reads on the axis.
    """
    own = {method: sorted((r for r in runs if r.method == method), key=lambda r: r.bytes) for method in methods}
    originals = [run for run in runs if run.method == ORIGINAL]
    several = any(len(group) > 1 for group in own.values())
    factor, unit = byte_unit(max(run.bytes for run in runs))
    chart = Chart(
        _bytes_axis([run.bytes / factor for run in runs], unit, room=0.5 if several else 0.12),
        Axis.around([run.value for run in runs], log=log, zero=not log, label=label),
        title=title,
        height=height,
        y_format=ticks,
    )
    for run in originals:
        ends = [(chart.x.low, run.value), (chart.x.high, run.value)]
        chart.line(ends, "var(--reference)", width=1, dashed=True)
    if front:
        best = pareto_front([(run.bytes / factor, run.value) for run in runs])
        chart.line(best, "var(--front)", width=7)
    for index, method in enumerate(methods):
        if len(own[method]) > 1:
            chart.line([(run.bytes / factor, run.value) for run in own[method]], category(index))
    labels = []
    for first in [group[0] for group in own.values() if group] + originals[:1]:
        place = chart.x.at(first.bytes / factor)
        labels.append(Label(place, chart.pixel(first.value), shorten(first.method, 14), left=several or place > 0.6))
    for wanted, moved in zip(labels, spread(labels, chart.height), strict=True):
        chart.label(moved, origin=wanted.y)
    for run in runs:
        index = 0 if run.method == ORIGINAL else methods.index(run.method)
        colour = "var(--ink)" if run.method == ORIGINAL else category(index)
        tip = f"{run.method}: {size(run.bytes)}, {label or title} {written(run.value)}"
        chart.mark(run.bytes / factor, run.value, index, colour, tip)
    return chart.render()


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other equals or beats in both coordinates (less is better), as they lie left to right."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _bytes_axis(values: Sequence[float], unit: str, *, room: float) -> Axis:
    """All values, with room for labels on the left as a share of their span."""
    low, high = min(values), max(values)
    span = (high - low) or 0.1 * high or 1.0
    return Axis(max(low - room * span, 0.0), high + 0.06 * span, label=f"bytes on disk, {unit}")
