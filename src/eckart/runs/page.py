"""One self-contained HTML page about a training run: its loss, its learning rate, its memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from eckart.report.axis import Axis
from eckart.report.numbers import byte_unit, count, significant, size
from eckart.report.page import facts, figure, legend, section, shell, tile, write
from eckart.report.svg import Chart, category
from eckart.runs.record import read_metrics

MOST = 400
KEPT = {
    "weight_bytes": "weights",
    "gradient_bytes": "gradients",
    "state_bytes": "optimiser state",
    "activation_bytes": "activations",
}
STROKE = '<path d="M-7 0H7" stroke="{}" stroke-width="2"/>'


def training_report(folder: Path) -> Path:
    """Write `report.html` into the folder of a finished run, from its `train.json` and `metrics.jsonl`."""
    record = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    result, settings, lines = record["result"], record["settings"], read_metrics(folder)
    structure = settings["structure"] or {}
    what = structure.get("method") or structure.get("form") or "dense weights"
    body = (
        _tiles(result)
        + section("Loss", _curve(lines, "loss", "nats a token", "Loss"), lead="Means over equal spans of steps.")
        + section("Learning rate", _curve(lines, "lr", "", "Learning rate", zero=True))
        + section(
            "Memory",
            _memory(lines),
            lead="Counted tensor by tensor; activations are what autograd keeps of one batch beside the weights.",
        )
        + section("Settings", _settings(settings))
    )
    page = shell(
        title=f"{what}, {settings['optimizer']['name']}",
        kicker="eckart · training report",
        lead=f"{result['steps']:,} steps, {count(result['parameters'])} parameters",
        body=body,
        foot=f"Written by eckart {record['versions']['eckart']}. This page is one file and loads nothing.",
    )
    return write(page, folder / "report.html")


def _tiles(result: dict[str, Any]) -> str:
    held = result["bytes"]
    kept = sum(held[name] for name in KEPT)
    tiles = [
        ("Held-out perplexity", significant(result["perplexity"]), "of the model as it is saved"),
        ("Loss", significant(result["loss"]), "nats a token, mean of the last twentieth of the steps"),
        ("Speed", significant(result["tokens_per_second"]), "tokens a second, the median step"),
        ("Counted memory", size(kept), f"optimiser state: {size(held['state_bytes'])}"),
    ]
    return f'<div class="tiles">{"".join(tile(n, v, d, measured=True) for n, v, d in tiles)}</div>'


def _curve(lines: Sequence[dict[str, Any]], key: str, unit: str, title: str, zero: bool = False) -> str:
    points = thinned([(line["step"], line[key]) for line in lines])
    if len(points) < 2:
        return ""
    chart = Chart(
        Axis(0, points[-1][0], label="step"), Axis.around([y for _, y in points], zero=zero, label=unit), title=title
    )
    chart.line(points, "var(--accent)")
    return figure("", chart.render())


def _memory(lines: Sequence[dict[str, Any]]) -> str:
    highest = max((line[name] for line in lines for name in KEPT), default=0)
    if len(lines) < 2 or not highest:
        return ""
    factor, unit = byte_unit(highest)
    chart = Chart(
        Axis(0, lines[-1]["step"], label="step"), Axis.around([highest / factor], zero=True, label=unit), title="Memory"
    )
    for index, name in enumerate(KEPT):
        chart.line(thinned([(line["step"], line[name] / factor) for line in lines]), category(index))
    key = [(STROKE.format(category(i)), f"{word}, {size(lines[-1][name])}") for i, (name, word) in enumerate(KEPT.items())]  # fmt: skip # noqa: E501
    return legend(key) + chart.render()


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST` points: the last step and the mean of each of so many spans."""
    span = -(-len(points) // MOST) or 1
    parts = [points[i : i + span] for i in range(0, len(points), span)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _settings(settings: dict[str, Any]) -> str:
    sections = {name: value for name, value in settings.items() if isinstance(value, dict)}
    parts = [facts([("seed", str(settings["seed"]))])]
    for name, section_ in sections.items():
        flat = {**section_, **section_.get("settings", {})}
        shown = [(k, _words(v)) for k, v in flat.items() if k != "settings" and v not in (None, "")]
        parts.append(f"<h3>{escape(name)}</h3>" + facts(shown))
    return "".join(parts)


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
