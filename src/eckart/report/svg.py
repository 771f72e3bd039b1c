"""A small plot kit: inline SVG whose text keeps its size on any screen.

A plot area's x runs in percent of whatever width the page gives it, its y in pixels; tick labels hang outside the area,
in the padding of the element around it. So one drawing serves a phone and a desk without scripts. Colours are CSS
variables of the page (`--c0`.. for categories, `--r0`.. for a ramp), so that light and dark share the drawing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from eckart.report.axis import Axis
from eckart.report.labels import PHONE, Label, shorten, text_width
from eckart.report.numbers import tick

COLOURS, SHAPES, RAMP = 6, 5, 13

Point = tuple[float, float]


def category(index: int) -> str:
    """The fill of the index-th category; with `shape(index)` 30 categories stay distinct without colour vision."""
    return f"var(--c{index % COLOURS})"


def ramp(fraction: float) -> str:
    """A step of the sequential ramp: 0 is nearest to the page, 1 is strongest."""
    return f"var(--r{round(min(max(fraction, 0.0), 1.0) * (RAMP - 1))})"


def shape(index: int, colour: str, tip: str = "") -> str:
    """The index-th marker, 10 px across, centred on the origin."""
    outlines = ("", "M-4.5-4.5h9v9h-9z", "M0-6L5.6 4.4H-5.6z", "M0-6L6 0L0 6L-6 0z", "M0 6L5.6-4.4H-5.6z")
    outline = outlines[index % SHAPES]
    title = f"<title>{escape(tip)}</title>" if tip else ""
    if not outline:
        return f'<circle class="mark" r="5" fill="{colour}">{title}</circle>'
    return f'<path class="mark" d="{outline}" fill="{colour}">{title}</path>'


class Chart:
    """A plot area with axes, onto which lines, marks, bars and labels are laid in order."""

    def __init__(
        self,
        x: Axis,
        y: Axis,
        *,
        title: str,
        height: int = 240,
        x_ticks: Sequence[float] | None = None,
        y_ticks: Sequence[float] | None = None,
        x_format: Callable[[float], str] = tick,
        y_format: Callable[[float], str] = tick,
    ) -> None:
        self.x, self.y, self.title, self.height = x, y, title, height
        self.x_ticks = x.ticks(5) if x_ticks is None else x_ticks
        self.y_ticks = y.ticks(min(max(3, height // 36), 8)) if y_ticks is None else y_ticks
        self.x_format, self.y_format = x_format, y_format
        self.parts: list[str] = []

    def percent(self, value: float) -> str:
        return f"{100 * self.x.at(value):.2f}%"

    def pixel(self, value: float) -> float:
        return round(self.height * (1 - self.y.at(value)), 1)

    def line(self, points: Iterable[Point], colour: str, *, width: float = 1.75, dashed: bool = False) -> None:
        """A polyline; a stretched inner drawing, since polylines know no percentages."""
        path = " ".join(f"{1000 * self.x.at(x):.1f},{self.pixel(y):g}" for x, y in points)
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self.parts.append(
            f'<svg class="stretch" viewBox="0 0 1000 {self.height}" preserveAspectRatio="none" width="100%" '
            f'height="{self.height}"><polyline points="{path}" stroke="{colour}" stroke-width="{width:g}"{dash}/></svg>'
        )

    def mark(self, x: float, y: float, index: int, colour: str, tip: str = "") -> None:
        """A marker of the index-th shape."""
        self.parts.append(
            f'<svg class="free" x="{self.percent(x)}" y="{self.pixel(y):g}">{shape(index, colour, tip)}</svg>'
        )

    def dot(self, x: float, y: float, colour: str, *, radius: float = 2.5, tip: str = "") -> None:
        title = f"<title>{escape(tip)}</title>" if tip else ""
        self.parts.append(
            f'<circle cx="{self.percent(x)}" cy="{self.pixel(y):g}" r="{radius:g}" fill="{colour}">{title}</circle>'
        )

    def column(self, x: float, width: float, top: float, colour: str, tip: str = "") -> None:
        """An upright bar from zero to `top`, `width` wide in x units, starting at x."""
        upper, lower = self.pixel(top), self.pixel(max(0.0, self.y.low))
        self.parts.append(
            f'<rect x="{self.percent(x)}" y="{upper:g}" width="{100 * width / (self.x.high - self.x.low):.2f}%" '
            f'height="{max(lower - upper, 0):.1f}" fill="{colour}"><title>{escape(tip)}</title></rect>'
        )

    def label(self, label: Label, *, origin: float | None = None) -> None:
        """Direct label; where `spread` moved it from `origin` (pixels), a leader says what it belongs to."""
        where, side, anchor = f"{100 * label.x:.2f}%", -1 if label.left else 1, "end" if label.left else "start"
        if origin is not None and abs(origin - label.y) > 7:
            leader = f'<line class="leader" x1="{4 * side}" y1="{origin - label.y:g}" x2="{9 * side}" y2="0"/>'
        else:
            leader = ""
        self.parts.append(
            f'<svg class="free" x="{where}" y="{label.y:g}">{leader}<text class="direct" x="{11 * side}" y="4" '
            f'text-anchor="{anchor}">{escape(label.text)}</text></svg>'
        )

    def render(self) -> str:
        """The drawing with its grid, ticks and axis names, as HTML."""
        grid = [
            f'<line class="grid" x1="0" x2="100%" y1="{self.pixel(v):g}" y2="{self.pixel(v):g}"/>'
            f'<text class="tick" x="-8" y="{self.pixel(v) + 4:g}" text-anchor="end">{escape(self.y_format(v))}</text>'
            for v in self.y_ticks
        ]
        grid += [
            f'<line class="grid" x1="{self.percent(v)}" x2="{self.percent(v)}" y1="{self.height}" '
            f'y2="{self.height + 4}"/>'
            f'<text class="tick" x="{self.percent(v)}" y="{self.height + 18}" text-anchor="middle">'
            f"{escape(self.x_format(v))}</text>"
            for v in self.x_ticks
        ]
        left = 14 + max((text_width(self.y_format(v)) for v in self.y_ticks), default=0)
        name = f'<p class="axis">{escape(self.y.label)}</p>' if self.y.label else ""
        foot = f'<p class="axis x">{escape(self.x.label)}</p>' if self.x.label else ""
        return (
            f'<div class="chart">{name}<div class="plot" style="padding-left:{left:.0f}px">'
            f'<svg role="img" aria-label="{escape(self.title)}" width="100%" height="{self.height}">'
            f"{''.join(grid)}{''.join(self.parts)}</svg></div>{foot}</div>"
        )


def bars(
    items: Sequence[tuple[str, float | None, str]],
    *,
    title: str,
    strong: int | None = None,
    whole: Sequence[float] | None = None,
) -> str:
    """Horizontal bars (name, value, written value) from zero; `strong` names the reference bar, drawn in grey.

    `whole` draws behind each bar, in grey, what it is a part of.
    """
    names = [shorten(name, 34) for name, _, _ in items]
    widest = max(map(text_width, names), default=0.0)
    above = widest > 0.4 * PHONE  # long names get a line of their own
    left, high, drop = (0.0, 42, 18) if above else (widest + 10, 24, 0)
    room = max((text_width(written) for _, _, written in items), default=0.0) + 8
    share = max(0.05, 1 - room / (PHONE - left))
    highest = max([value for _, value, _ in items if value is not None] + list(whole or []), default=0.0) or 1.0
    parts = []
    for row, ((name, value, written), short) in enumerate(zip(items, names, strict=True)):
        y, width = high * row + drop, 100 * share * max(value or 0.0, 0.0) / highest
        fill = "var(--reference)" if row == strong else "var(--accent)"
        back = 100 * share * max(whole[row], 0.0) / highest if whole else 0.0
        behind = f'<rect x="0" y="{y + 3}" width="{back:.2f}%" height="16" rx="2" fill="var(--reference)"/>'
        place = f'x="0" y="{y - 3}"' if above else f'x="-8" y="{y + 15}" text-anchor="end"'
        parts.append(
            f'<text class="tick name" {place}>{escape(short)}</text>'
            f'{behind if whole else ""}<rect x="0" y="{y + 3}" width="{width:.2f}%" height="16" rx="2" fill="{fill}">'
            f"<title>{escape(f'{name}: {written}')}</title></rect>"
            f'<text class="value" x="{max(width, back):.2f}%" dx="6" y="{y + 15}">{escape(written)}</text>'
        )
    return (
        f'<div class="chart"><div class="plot bare" style="padding-left:{left:.0f}px"><svg role="img" '
        f'aria-label="{escape(title)}" width="100%" height="{high * len(items)}">{"".join(parts)}</svg></div></div>'
    )


def heat_map(
    rows: Sequence[str],
    columns: Sequence[int],
    cells: dict[tuple[str, int], tuple[float, str]],
    *,
    title: str,
    domain: tuple[float, float],
    written: Callable[[float], str],
    names: dict[str, str] | None = None,
) -> str:
    """Cells (row, column) -> (value, tip) on the ramp from domain[0] to domain[1]; absent cells stay empty."""
    low, high = domain
    short = {row: shorten((names or {}).get(row, row), 18) for row in rows}
    left = 10 + max((text_width(name) for name in short.values()), default=0)
    step, parts = 100 / max(len(columns), 1), []
    for i, row in enumerate(rows):
        parts.append(
            f'<text class="tick name" x="-8" y="{22 * i + 15}" text-anchor="end">{escape(short[row])}'
            f"<title>{escape(row)}</title></text>"
        )
        for j, column in enumerate(columns):
            if (row, column) in cells:
                value, tip = cells[row, column]
                fill = ramp((value - low) / (high - low) if high > low else 1.0)
                parts.append(
                    f'<rect class="cell" x="{step * j:.2f}%" y="{22 * i}" width="{step:.2f}%" height="22" '
                    f'fill="{fill}"><title>{escape(tip)}</title></rect>'
                )
    bottom = 22 * len(rows)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if len(columns) / n <= 8)
    for j, column in enumerate(columns):
        if j % every == 0:
            parts.append(
                f'<text class="tick" x="{step * (j + 0.5):.2f}%" y="{bottom + 15}" text-anchor="middle">{column}</text>'
            )
    swatches = "".join(f'<i style="background:{ramp(i / (RAMP - 1))}"></i>' for i in range(RAMP))
    key = f'<p class="key"><span>{escape(written(low))}</span>{swatches}<span>{escape(written(high))}</span></p>'
    return (
        f'<div class="chart"><div class="plot heat" style="padding-left:{left:.0f}px"><svg role="img" '
        f'aria-label="{escape(title)}" width="100%" height="{bottom}">{"".join(parts)}</svg></div>'
        f'<p class="axis x">block</p>{key if high > low else ""}</div>'
    )
