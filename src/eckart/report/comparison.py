"""The report that lays several methods side by side: what each costs in bytes and what it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from eckart.report.charts import mean_map
from eckart.report.layers import Layer, read_layers
from eckart.report.numbers import MISSING, duration, finite, percent, significant, size, tick
from eckart.report.page import Cell, figure, section, shell, table, write
from eckart.report.pareto import ORIGINAL, Row, against_bytes, method_of, methods_of, pareto_plot, runs_of
from eckart.report.svg import bars

# key, heading, how it is written, and whether more (1) or less (-1) is better or neither is (0)
COLUMNS: tuple[tuple[str, str, Callable[[object], str], int], ...] = (
    ("bytes_disk", "On disk", size, 0),
    ("perplexity", "Perplexity", significant, -1),
    ("kl", "KL, nats", significant, -1),
    ("top1_agreement", "Agreement", percent, 1),
    ("decode_tokens_per_second", "Decode, tokens/s", significant, 1),
    ("prefill_tokens_per_second", "Prefill, tokens/s", significant, 1),
    ("peak_memory", "Peak memory", size, -1),
    ("seconds", "Time", duration, -1),
)

# key, heading, the unit of its axis, how it is written
PLOTTED: tuple[tuple[str, str, str, Callable[[object], str]], ...] = (
    ("top1_agreement", "Top-1 agreement with the original", "", percent),
    ("decode_tokens_per_second", "Decode, tokens/s", "", significant),
    ("prefill_tokens_per_second", "Prefill, tokens/s", "", significant),
    ("seconds", "Time to compress", "seconds", duration),
)


def comparison_report(
    rows: Sequence[Row],
    out: Path,
    *,
    title: str,
    subtitle: str,
    layers: Mapping[str, list[dict[str, Any]]] | None = None,
) -> Path:
    """Write the HTML comparison of several runs and return its path.

    Each row is one run: "method", "budget" and the keys of COLUMNS, any of them missing where not measured; the row of
    method "original" is the model before compression. `layers` gives the layer records of each method for the rank
    maps. ValueError where there is nothing to compare.
    """
    if all(method_of(row) == ORIGINAL for row in rows):
        raise ValueError("There is nothing to compare: give at least one row whose method is not 'original'.")
    names = _names(rows)
    body = (
        section(
            "Bytes and perplexity",
            pareto_plot(rows) + _absent(rows, names),
            lead="Lower and further left is better. The broad grey line joins the runs that none beats on both.",
        )
        + section("Figures", _table(rows), lead="The best of each budget is bold. Click a heading to sort.")
        + section("Agreement and speed", _figures(rows, names))
        + section(
            "Where each method keeps its rank",
            _maps(layers or {}),
            lead="Share of each layer's full rank (of its bytes, for forms without a rank), on one scale.",
        )
    )
    page = shell(
        title=title,
        kicker="eckart · comparison",
        lead=subtitle,
        body=body,
        foot="Written by eckart. This page is one file and loads nothing.",
    )
    return write(page, Path(out))


def _names(rows: Sequence[Row]) -> list[str]:
    """The method, with its budget where the same method was run at several."""
    methods = [method_of(row) for row in rows]
    return [
        f"{method} {row['budget']}" if methods.count(method) > 1 and row.get("budget") is not None else method
        for method, row in zip(methods, rows, strict=True)
    ]


def _absent(rows: Sequence[Row], names: Sequence[str]) -> str:
    lost = [name for row, name in zip(rows, names, strict=True) if not runs_of([row])]
    return f'<p class="hint">Not drawn, for want of finite figures: {escape(", ".join(lost))}.</p>' if lost else ""


def _table(rows: Sequence[Row]) -> str:
    head = [("Method", "text"), ("Budget", ""), *((heading, "") for _, heading, _, _ in COLUMNS)]
    if any(row.get("folder") for row in rows):
        head.append(("Folder", "text"))
    lines = []
    for row in rows:
        budget = row.get("budget")
        cells = [Cell(method_of(row)), Cell("–" if budget is None else str(budget))]
        for key, _, written, better in COLUMNS:
            value = finite(row.get(key))
            text = written(row.get(key))
            cells.append(
                Cell(
                    "–" if text == MISSING else text,
                    "" if value is None else value,
                    "best" if value is not None and better and value == _best(rows, row, key, better) else "",
                )
            )
        if len(head) > len(cells):
            cells.append(Cell(str(row.get("folder") or "–"), kind="text"))
        lines.append(cells)
    return table(head, lines, sortable=True)


def _best(rows: Sequence[Row], row: Row, key: str, better: int) -> float | None:
    """The best value among the compressed rows of this row's budget, where there is a choice."""
    if method_of(row) == ORIGINAL:
        return None
    peers = [peer for peer in rows if peer.get("budget") == row.get("budget") and method_of(peer) != ORIGINAL]
    values = [value for value in (finite(peer.get(key)) for peer in peers) if value is not None]
    return better * max(better * value for value in values) if len(values) > 1 else None


def _figures(rows: Sequence[Row], names: Sequence[str]) -> str:
    """One plot per figure: bars where each method ran once, lines over bytes where some ran at several budgets."""
    methods, figures = methods_of(rows), ""
    several = len(methods) < sum(method_of(row) != ORIGINAL for row in rows)
    for key, heading, unit, written in PLOTTED:
        values = [finite(row.get(key)) for row in rows]
        if all(value is None for value in values):
            continue
        runs = runs_of(rows, key, log=False)
        if several and runs:
            drawing = against_bytes(
                runs,
                methods,
                label=unit,
                title=heading,
                log=False,
                height=260,
                written=written,
                ticks=(lambda value: f"{value:.0%}") if written is percent else tick,
            )
        else:
            items = [
                (name, value, written(value), method_of(row) == ORIGINAL)
                for name, value, row in zip(names, values, rows, strict=True)
                if value is not None or method_of(row) != ORIGINAL
            ]
            strong = next((index for index, item in enumerate(items) if item[3]), None)
            drawing = bars([item[:3] for item in items], title=heading, strong=strong)
        figures += figure(heading, drawing)
    return f'<div class="grid2">{figures}</div>' if figures else ""


def _maps(records: Mapping[str, list[dict[str, Any]]]) -> str:
    """One heat map per method, on one scale from nothing to everything kept."""

    def kept(layer: Layer) -> float | None:
        return layer.kept_bytes if layer.kept_rank is None else layer.kept_rank

    figures = ""
    for method, raw in records.items():
        drawing = mean_map(read_layers(raw), kept, title=f"Kept by {method}", highest=1.0)
        figures += figure(method, drawing) if drawing else ""
    return f'<div class="grid2">{figures}</div>' if figures else ""
