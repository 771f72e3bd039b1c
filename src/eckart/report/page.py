"""The HTML around the figures: shell, style, tables, headline tiles. One file, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

from eckart.files import whole

_HERE = resources.files(__package__)
STYLE = _HERE.joinpath("page.css").read_text("utf-8")
SCRIPT = _HERE.joinpath("page.js").read_text("utf-8")


def shell(*, title: str, kicker: str, lead: str, body: str, foot: str) -> str:
    """A whole page. `title`, `kicker`, `lead` and `foot` are text; `body` is HTML.

    The content policy lets the browser load nothing and run no script but this module's own, whatever the data hold.
    """
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<header>\n"
        f'<p class="kicker">{escape(kicker)}</p>\n<h1>{escape(title)}</h1>\n<p class="soft">{escape(lead)}</p>\n'
        f"</header>\n{body}\n<footer>{escape(foot)}</footer>\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(heading: str, body: str, *, lead: str = "") -> str:
    """A section of HTML under a heading; nothing where the body is empty."""
    if not body:
        return ""
    text = f'<p class="soft">{escape(lead)}</p>' if lead else ""
    return f"<section>\n<h2>{escape(heading)}</h2>{text}\n{body}\n</section>\n"


def figure(heading: str, drawing: str, *, lead: str = "") -> str:
    text = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<figure><figcaption><h3>{escape(heading)}</h3>{text}</figcaption>{drawing}</figure>"


def tile(name: str, value: str, detail: str, *, measured: bool, meter: float | None = None) -> str:
    """One headline figure; `meter` (0 to 1) draws how full it is."""
    share = 100 * min(max(meter or 0.0, 0.0), 1.0)
    gauge = "" if meter is None else f'<div class="meter"><i style="width:{share:.1f}%"></i></div>'
    style = "" if measured else ' class="none"'
    return (
        f'<div class="tile">{escape(name)}<strong{style}>{escape(value)}</strong>{gauge}<p>{escape(detail)}</p></div>'
    )


@dataclass(frozen=True)
class Cell:
    """A table cell: text, the value it sorts by (its text where None), and HTML drawn instead of the text."""

    text: str
    value: float | str | None = None
    kind: str = ""
    html: str = ""


def table(head: Sequence[tuple[str, str]], rows: Iterable[Sequence[Cell]], *, sortable: bool = False) -> str:
    """A table in a box that scrolls sideways by itself. `head` is (title, kind) with kind "text" for left-aligned."""
    titles = "".join(f'<th scope="col"{_kind(kind)}>{escape(title)}</th>' for title, kind in head)
    lines = []
    for row in rows:
        cells = []
        for cell in row:
            value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
            cells.append(f"<td{_kind(cell.kind)}{value}>{cell.html or escape(cell.text)}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    style = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll"><table{style}><thead><tr>{titles}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _kind(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and values."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f'<dl class="facts">{rows}</dl>' if rows else ""


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Entries of (drawing of about 14 px as SVG content centred on the origin, name)."""
    items = "".join(
        f'<li><svg width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">{drawing}</svg>'
        f"<span>{escape(name)}</span></li>"
        for drawing, name in entries
    )
    return f'<ul class="legend">{items}</ul>'


def write(page: str, out: Path) -> Path:
    """Write the page whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole(out) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return out
