"""The report of one compressed model: what it cost, what it kept, and whether the predictions held."""

from __future__ import annotations

import json
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import Any

from eckart.report import charts
from eckart.report.headline import headline, predictions
from eckart.report.layers import Layer, read_layers
from eckart.report.numbers import percent, significant, size
from eckart.report.page import Cell, facts, figure, section, shell, table, write
from eckart.report.provenance import budget, part, provenance


def model_report(folder: Path, out: Path | None = None) -> Path:
    """Write the HTML report of a compressed model's folder and return its path (default `folder/report.html`).

    Reads `folder/eckart.json`, and where present `folder/evaluation.json` and `folder.run.json` beside it; figures that
    these lack are shown as not measured. FileNotFoundError where the folder holds no eckart.json, ValueError where a
    file is no JSON object.
    """
    folder = Path(folder).resolve()
    record = _read(folder / "eckart.json")
    if record is None:
        raise FileNotFoundError(f"{folder} has no eckart.json; give a folder that `eckart compress` wrote.")
    evaluation = _read(folder / "evaluation.json") or {}
    run = _read(folder.with_name(folder.name + ".run.json")) or {}
    layers = read_layers(record.get("layers"))
    model, job = part(record, "model"), part(record, "job")
    recipe = job.get("method") or job.get("form") or "compressed"
    body = (
        headline(record, evaluation)
        + section(
            "Predicted and measured",
            predictions(record, evaluation, run, layers),
            lead="What the plan promised before anything changed, beside what came out.",
        )
        + section("Where the bytes went", _bytes(layers))
        + section(
            "Error by layer",
            charts.error_panels(layers),
            lead="Relative error in the metric over depth: 0 is exact, 1 is nothing kept.",
        )
        + section(
            "Spectra",
            charts.spectra(layers),
            lead="Singular values in the metric, relative to the largest, against the share of the full rank. "
            "One line per block; the dot marks where it was cut. Values below 10⁻⁴ are drawn there.",
        )
        + section("How it was made", provenance(record, evaluation, run, folder.name))
        + section("Every layer", _notes(layers) + _layer_table(layers), lead="Click a heading to sort.")
    )
    page = shell(
        title=str(model.get("source") or folder.name),
        kicker="eckart · compression report",
        lead=f"{recipe} at a budget of {budget(record)}, saved as {folder.name}",
        body=body,
        foot=f"Written by eckart {record.get('eckart') or ''}. This page is one file and loads nothing.",
    )
    return write(page, out or folder / "report.html")


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); remove it or write it again.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(data).__name__}.")
    return data


def _bytes(layers: list[Layer]) -> str:
    figures = charts.rank_maps(layers)
    for heading, drawing in (
        ("Bytes by projection type", charts.bytes_by_projection(layers)),
        ("Bytes by block", charts.bytes_by_block(layers)),
    ):
        figures += figure(heading, drawing) if drawing else ""
    return f'<div class="grid2">{figures}</div>' if figures else ""


def _notes(layers: list[Layer]) -> str:
    """What was left as it was, or done differently, in words."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for layer in layers:
        if layer.note:
            groups[layer.note].append(layer.name)
    return facts(
        (
            f"{len(names)} layer{'s' if len(names) > 1 else ''}",
            f"{note}: {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else ""),
        )
        for note, names in groups.items()
    )


def _layer_table(layers: list[Layer]) -> str:
    if not layers:
        return '<p class="hint">This checkpoint records no layers.</p>'
    head = [("Layer", "text"), ("Form", "text"), ("Shape", ""), ("Rank", ""), ("Rank kept", ""), ("Bytes", "")]
    head += [("Of dense", ""), ("Predicted error", ""), ("Measured error", "")]
    return table(head, [_layer_row(layer) for layer in layers], sortable=True)


def _layer_row(layer: Layer) -> list[Cell]:
    def number(value: float | None, text: str) -> Cell:
        return Cell("–", "") if value is None else Cell(text, value)

    note = f"<small>{escape(layer.note)}</small>" if layer.note else ""
    return [
        Cell(layer.name, layer.name, html=escape(layer.name) + note),
        Cell(layer.form, kind="text wrap"),
        Cell("×".join(map(str, layer.shape)) or "–", layer.dense_bytes if layer.dense_bytes is not None else ""),
        number(layer.rank, f"{layer.rank:,}" if layer.rank is not None else ""),
        number(layer.kept_rank, percent(layer.kept_rank)),
        number(layer.bytes, size(layer.bytes)),
        number(layer.kept_bytes, percent(layer.kept_bytes)),
        number(layer.predicted, significant(layer.predicted)),
        number(layer.measured, significant(layer.measured)),
    ]
