"""The per-layer figures that a model's report and a comparison share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from eckart.report.axis import Axis
from eckart.report.layers import Layer, blocks, projections, short_names
from eckart.report.numbers import byte_unit, percent, significant, size
from eckart.report.page import figure, legend
from eckart.report.svg import RAMP, Chart, bars, category, heat_map, ramp, shape

FLOOR = 1e-4  # normalised singular values below this are drawn at it

Measure = Callable[[Layer], float | None]


def mean_map(layers: Sequence[Layer], measure: Measure, *, title: str, highest: float | None = None) -> str:
    """A heat map of a fraction from 0 to `highest`, projection type by block; experts of one cell are averaged."""
    found: dict[tuple[str, int], list[float]] = {}
    for layer in layers:
        value = measure(layer)
        if layer.block is not None and value is not None:
            found.setdefault((layer.projection, layer.block), []).append(value)
    if not found:
        return ""
    cells = {
        (kind, block): (mean, f"{kind}, block {block}: {percent(mean)}")
        for (kind, block), values in found.items()
        for mean in [sum(values) / len(values)]
    }
    top = max(value for value, _ in cells.values()) if highest is None else highest
    rows = [kind for kind in projections(layers) if any(row == kind for row, _ in cells)]
    return heat_map(
        rows,
        blocks(layers),
        cells,
        title=title,
        domain=(0.0, top or 1.0),
        written=percent,
        names=short_names(rows),
    )


def rank_maps(layers: Sequence[Layer]) -> str:
    """Kept rank and kept bytes, projection type by block."""
    figures = []
    for heading, lead, measure in (
        ("Rank kept", "Share of each layer's full rank; blank where its form has none.", lambda layer: layer.kept_rank),
        ("Bytes kept", "Share of each layer's dense bytes.", lambda layer: layer.kept_bytes),
    ):
        drawing = mean_map(layers, measure, title=heading)
        if drawing:
            figures.append(figure(heading, drawing, lead=lead))
    return "".join(figures)


def bytes_by_projection(layers: Sequence[Layer]) -> str:
    """Bytes kept by projection type, beside the dense bytes."""
    kinds = list(dict.fromkeys(layer.projection for layer in layers))
    names, rows, whole = short_names(kinds), [], []
    for kind in kinds:
        group = [layer for layer in layers if layer.projection == kind]
        kept = sum(layer.bytes or 0.0 for layer in group)
        dense = sum(layer.dense_bytes or 0.0 for layer in group)
        factor, unit = byte_unit(dense)
        rows.append((names[kind], kept, f"{significant(kept / factor)} of {significant(dense / factor)} {unit}"))
        whole.append(dense)
    return bars(rows, title="Bytes kept by projection type", whole=whole) if any(whole) else ""


def bytes_by_block(layers: Sequence[Layer]) -> str:
    """Dense and kept bytes of every block, one drawn inside the other."""
    numbers = blocks(layers)
    totals = []
    for number in numbers:
        group = [layer for layer in layers if layer.block == number]
        totals.append((sum(x.dense_bytes or 0.0 for x in group), sum(x.bytes or 0.0 for x in group)))
    highest = max((max(pair) for pair in totals), default=0.0)
    if not highest:
        return ""
    factor, unit = byte_unit(highest)
    chart = Chart(
        Axis(-0.5, len(numbers) - 0.5, label="block"),
        Axis.around([highest / factor], zero=True, label=unit),
        title="Bytes by block",
        height=180,
        x_ticks=_every(len(numbers)),
        x_format=lambda value: str(numbers[round(value)]),
    )
    for index, (dense, kept) in enumerate(totals):
        tip = f"block {numbers[index]}: {size(kept)} of {size(dense)}"
        chart.column(index - 0.4, 0.8, dense / factor, "var(--reference)", tip)
        chart.column(index - 0.4, 0.8, kept / factor, "var(--accent)", tip)
    square = '<rect x="-6" y="-6" width="12" height="12" rx="2" fill="{}"/>'
    key = [(square.format("var(--reference)"), "dense"), (square.format("var(--accent)"), "kept")]
    return legend(key) + chart.render()


def error_scatter(layers: Sequence[Layer]) -> str:
    """Measured against predicted relative error of every layer, on logarithmic axes, with the diagonal."""
    points = [
        (layer, layer.predicted, layer.measured)
        for layer in layers
        if layer.predicted and layer.measured and layer.predicted > 0 and layer.measured > 0
    ]
    if not points:
        return ""
    both = Axis.around([value for _, *pair in points for value in pair], log=True)
    chart = Chart(
        Axis(both.low, both.high, True, "predicted"),
        Axis(both.low, both.high, True, "measured"),
        title="Measured against predicted error",
        height=280,
    )
    chart.line([(both.low, both.low), (both.high, both.high)], "var(--soft)", width=1, dashed=True)
    kinds = list(dict.fromkeys(layer.projection for layer, _, _ in points))
    names = short_names(kinds)
    for layer, predicted, measured in points:
        index = kinds.index(layer.projection)
        tip = f"{layer.name}: predicted {significant(predicted)}, measured {significant(measured)}"
        chart.mark(predicted, measured, index, category(index), tip)
    return legend((shape(i, category(i)), names[kind]) for i, kind in enumerate(kinds)) + chart.render()


def error_panels(layers: Sequence[Layer]) -> str:
    """Relative error over blocks, one panel per projection type on a shared scale: line predicted, dots measured."""
    inside = [x for x in layers if x.block is not None and (x.predicted is not None or x.measured is not None)]
    if not inside:
        return ""
    values = [value for x in inside for value in (x.predicted, x.measured) if value is not None]
    numbers = blocks(inside)
    place = {number: index for index, number in enumerate(numbers)}
    x, y = Axis(-0.5, len(numbers) - 0.5), Axis.around(values, zero=True)
    ends = [float(index) for index in dict.fromkeys((0, len(numbers) // 2, len(numbers) - 1))]
    panels, kinds = [], projections(inside)
    names = short_names(kinds)
    for kind in kinds:
        chart = Chart(
            x,
            y,
            title=f"Relative error of {kind} over blocks",
            height=110,
            x_ticks=ends,
            x_format=lambda index: str(numbers[round(index)]),
        )
        group = [layer for layer in inside if layer.projection == kind]
        chart.line([(place[block], mean) for block, mean in _mean_by_block(group)], "var(--reference)")
        for layer in group:
            if layer.block is not None and layer.measured is not None:
                tip = f"{layer.name}: predicted {significant(layer.predicted)}, measured {significant(layer.measured)}"
                chart.dot(place[layer.block], layer.measured, "var(--accent)", tip=tip)
        panels.append(figure(names[kind], chart.render()))
    key = [
        ('<path d="M-7 0H7" stroke="var(--reference)" stroke-width="2"/>', "predicted"),
        ('<circle r="3.5" fill="var(--accent)"/>', "measured"),
    ]
    return f'{legend(key)}<div class="small">{"".join(panels)}</div>'


def spectra(layers: Sequence[Layer]) -> str:
    """Normalised singular values, one panel per projection type, one line per block, a dot where the rank was cut."""
    inside = [layer for layer in layers if layer.block is not None and len(layer.spectrum) > 1]
    if not inside:
        return ""
    numbers = blocks(inside)
    place = {number: index / max(len(numbers) - 1, 1) for index, number in enumerate(numbers)}
    lowest = min(max(value, FLOOR) for layer in inside for value in layer.spectrum)
    highest = max(max(value, FLOOR) for layer in inside for value in layer.spectrum)
    y = Axis.around([lowest, highest], log=True)
    panels, kinds = [], projections(inside)
    names = short_names(kinds)
    for kind in kinds:
        chart = Chart(
            Axis(0, 1), y, title=f"Spectra of {kind}", height=130, x_ticks=[0, 0.5, 1], x_format=lambda v: f"{v:.0%}"
        )
        cuts = []
        for layer in inside:
            if layer.block is None or layer.projection != kind:
                continue
            colour = _depth(place[layer.block])
            heights = [max(value, FLOOR) for value in layer.spectrum]
            chart.line([(i / (len(heights) - 1), value) for i, value in enumerate(heights)], colour, width=1.25)
            if layer.kept_rank is not None and 0 < layer.kept_rank < 1:
                cuts.append((layer, layer.kept_rank, _between(heights, layer.kept_rank), colour))
        for layer, kept, value, colour in cuts:
            chart.dot(kept, value, colour, radius=3, tip=f"{layer.name}: rank {layer.rank}, {percent(kept)} kept")
        panels.append(figure(names[kind], chart.render()))
    swatches = "".join(f'<i style="background:{_depth(i / (RAMP - 1))}"></i>' for i in range(RAMP))
    key = f'<p class="key chart"><span>block {numbers[0]}</span>{swatches}<span>block {numbers[-1]}</span></p>'
    return f'{key if len(numbers) > 1 else ""}<div class="small">{"".join(panels)}</div>'


def _depth(fraction: float) -> str:
    return ramp(0.25 + 0.75 * fraction)


def _between(heights: Sequence[float], fraction: float) -> float:
    """The curve's value at a fraction of its length, straight (on the logarithmic axis) between samples."""
    place = fraction * (len(heights) - 1)
    index = min(int(place), len(heights) - 2)
    share = place - index
    return float(heights[index] ** (1 - share) * heights[index + 1] ** share)


def _mean_by_block(group: Iterable[Layer]) -> list[tuple[int, float]]:
    """The predicted errors, experts of one block averaged."""
    found: dict[int, list[float]] = {}
    for layer in group:
        if layer.block is not None and layer.predicted is not None:
            found.setdefault(layer.block, []).append(layer.predicted)
    return [(block, sum(values) / len(values)) for block, values in sorted(found.items())]


def _every(length: int) -> list[float]:
    step = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if length / n <= 8)
    return [float(index) for index in range(0, length, step)]
