"""Bytes against perplexity: every run a point, every method a line, and the front that no other run beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eckart.report.axis import Axis
from eckart.report.numbers import byte_unit, finite, significant, size
from eckart.report.page import legend
from eckart.report.svg import Chart, Label, category, shape, spread

ORIGINAL = "original"


@dataclass(frozen=True)
class Run:
    """One point of the plot."""

    method: str
    bytes: float
    perplexity: float

    @property
    def tip(self) -> str:
        return f"{self.method}: {size(self.bytes)}, perplexity {significant(self.perplexity)}"


def method_of(row: Mapping[str, Any]) -> str:
    return str(row.get("method") or "unnamed")


def runs_of(rows: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The rows that have both a size and a positive finite perplexity."""
    runs = []
    for row in rows:
        weight, perplexity = finite(row.get("bytes_disk")), finite(row.get("perplexity"))
        if weight is not None and weight >= 0 and perplexity is not None and perplexity > 0:
            runs.append(Run(method_of(row), weight, perplexity))
    return runs


def pareto_plot(rows: Sequence[Mapping[str, Any]]) -> str:
    """The plot with its legend, as HTML; empty where no row has both figures."""
    runs = runs_of(rows)
    if not runs:
        return ""
    methods = list(dict.fromkeys(method for method in map(method_of, rows) if method != ORIGINAL))
    own = {method: sorted((r for r in runs if r.method == method), key=lambda r: r.bytes) for method in methods}
    originals = [run for run in runs if run.method == ORIGINAL]
    several = any(len(group) > 1 for group in own.values())
    factor, unit = byte_unit(max(run.bytes for run in runs))
    chart = Chart(
        _bytes_axis([run.bytes / factor for run in runs], unit, room=0.5 if several else 0.12),
        Axis.around([run.perplexity for run in runs], log=True, label="perplexity"),
        title="Perplexity against bytes on disk",
        height=380,
    )
    for run in originals:
        ends = [(chart.x.low, run.perplexity), (chart.x.high, run.perplexity)]
        chart.line(ends, "var(--reference)", width=1, dashed=True)
    front = pareto_front([(run.bytes / factor, run.perplexity) for run in runs])
    chart.line(front, "var(--front)", width=7)
    for index, method in enumerate(methods):
        if len(own[method]) > 1:
            chart.line([(run.bytes / factor, run.perplexity) for run in own[method]], category(index))
    labels = []
    for first in [group[0] for group in own.values() if group] + originals[:1]:
        place = chart.x.at(first.bytes / factor)
        labels.append(Label(place, chart.pixel(first.perplexity), first.method, left=several or place > 0.6))
    for label, moved in zip(labels, spread(labels, chart.height), strict=True):
        chart.label(moved, origin=label.y)
    for run in runs:
        index = 0 if run.method == ORIGINAL else methods.index(run.method)
        colour = "var(--ink)" if run.method == ORIGINAL else category(index)
        chart.mark(run.bytes / factor, run.perplexity, index, colour, run.tip)
    key = [(shape(i, category(i)), method) for i, method in enumerate(methods) if own[method]]
    return legend(key + [(shape(0, "var(--ink)"), ORIGINAL)] * bool(originals)) + chart.render()


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
