"""The pages in a real headless browser: nothing overflows a phone, no labels overlap, sorting and tips work."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eckart.report import comparison_report, model_report

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# The page under test lies unchanged in a frame, so that its own content policy holds, and a script outside measures it.
WRAPPER = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="frame" width="{width}" height="6000" style="border:0" srcdoc="{page}"></iframe><pre id="result"></pre>
<script>
frame.onload = () => {{
  const doc = frame.contentDocument, found = {{overlaps: [], outside: [], ranks: []}};
  const wide = doc.documentElement.clientWidth;
  found.overflow = doc.documentElement.scrollWidth - wide;
  const boxes = text => [text.textContent, text.getBoundingClientRect()];
  for (const drawing of doc.querySelectorAll('svg[role=img]')) {{
    const texts = [...drawing.querySelectorAll('text')].map(boxes);
    found.texts = (found.texts || 0) + texts.length;
    texts.forEach(([a, p], i) => {{
      if (p.left < 0 || p.right > wide) found.outside.push(a);
      for (const [b, q] of texts.slice(0, i))
        if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 2 && q.top < p.bottom - 2)
          found.overlaps.push([drawing.getAttribute('aria-label'), a, b]);
    }});
  }}
  const marked = doc.querySelector('[data-tip]');
  marked.dispatchEvent(new frame.contentWindow.PointerEvent('pointerover', {{bubbles: true}}));
  found.tip = !doc.querySelector('#tip').hidden && doc.querySelector('#tip').textContent;
  const table = doc.querySelector('table.sortable');
  const column = [...table.querySelectorAll('th')].findIndex(head => head.textContent === '{heading}');
  table.querySelectorAll('th')[column].querySelector('button').click();
  for (const row of table.tBodies[0].rows) found.ranks.push(row.cells[column].textContent);
  result.textContent = JSON.stringify(found);
}};
</script>"""


@pytest.fixture
def measure(tmp_path: Path) -> Callable[[Path, int, str], dict[str, Any]]:
    """Renders a page at a width in headless Chromium, clicks one heading, and says what was seen."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.fail("This test needs Chromium on the PATH; install it with `apt-get install chromium` or the like.")

    def look(page: Path, width: int, heading: str) -> dict[str, Any]:
        wrapper = tmp_path / f"wrapper{width}.html"
        content = html.escape(page.read_text(encoding="utf-8"))
        wrapper.write_text(WRAPPER.format(width=width, page=content, heading=heading), encoding="utf-8")
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom")
        profile, size = f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},6000"
        run = subprocess.run(
            [browser, *options, profile, size, "--virtual-time-budget=10000", wrapper.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        result = re.search(r'<pre id="result">(.+?)</pre>', run.stdout, re.DOTALL)
        assert result, f"the page did not load:\n{run.stderr[-2000:]}"
        found: dict[str, Any] = json.loads(html.unescape(result[1]))
        return found

    return look


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_model_page(folder: Path, measure: Callable[[Path, int, str], dict[str, Any]], width: int) -> None:
    found = measure(model_report(folder), width, "Rank")
    assert found["overflow"] <= 0
    assert found["overlaps"] == []
    assert found["outside"] == []
    assert found["texts"] > 90
    assert found["tip"] == "calibrate: 61.2 s"
    ranks = [int(rank) for rank in found["ranks"] if rank != "–"]
    assert len(ranks) > 10
    assert ranks == sorted(ranks)
    assert found["ranks"][-1] == "–"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("budgets", [("0.8",), ("0.8", "0.6")])
def test_comparison_page(
    rows: list[dict[str, Any]],
    records: list[dict[str, Any]],
    tmp_path: Path,
    measure: Callable[[Path, int, str], dict[str, Any]],
    budgets: tuple[str, ...],
    width: int,
) -> None:
    some = [row for row in rows if row["budget"] in (None, *budgets)]
    page = comparison_report(some, tmp_path / "a.html", title="t" * 60, subtitle="s", layers={"auto": records})
    found = measure(page, width, "Method")
    assert found["overflow"] <= 0
    assert found["overlaps"] == []
    assert found["outside"] == []
    assert found["tip"]
    assert found["ranks"] == sorted(found["ranks"])


def test_long_and_hostile_names_fit(
    save: Callable[..., Path], record: dict[str, Any], measure: Callable[[Path, int, str], dict[str, Any]]
) -> None:
    hostile = "_a_long_name_without_spaces" * 3 + "'\"><script>document.body.innerHTML=''</script>"
    record["model"]["source"] = record["job"]["method"] = record["job"][hostile] = hostile
    for layer in record["layers"]:
        layer["name"] += hostile
        layer["form"] = layer["note"] = hostile
    found = measure(
        model_report(save(record, {"text": hostile, "perplexity": 3.0}, {"seconds": {hostile: 1}})), 320, "Rank"
    )
    assert found["overflow"] <= 0
    assert found["overlaps"] == []
    assert found["outside"] == []
    assert len(found["ranks"]) == len(record["layers"])


def test_a_page_that_overflows_is_noticed(
    folder: Path, tmp_path: Path, measure: Callable[[Path, int, str], dict[str, Any]]
) -> None:
    """The measure itself: a page with something too wide, and with two labels on one spot, must not pass."""
    page = model_report(folder).read_text(encoding="utf-8")
    wide = '<div style="width:900px">x</div><svg role="img" width="9" height="9"><text>aaa</text><text>bbb</text></svg>'
    spoiled = tmp_path / "spoiled.html"
    spoiled.write_text(page.replace("<main>", f"<main>{wide}", 1), encoding="utf-8")
    found = measure(spoiled, 390, "Rank")
    assert found["overflow"] > 400
    assert [None, "bbb", "aaa"] in found["overlaps"]
