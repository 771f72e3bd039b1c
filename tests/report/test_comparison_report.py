from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eckart.report import comparison_report
from eckart.report.pareto import pareto_front, runs_of


def test_comparison_shows_every_run(
    rows: list[dict[str, Any]], records: list[dict[str, Any]], tmp_path: Path, outline: Callable[[str], Any]
) -> None:
    layers = {"svd_llm": records, "auto": records}
    path = comparison_report(rows, tmp_path / "a.html", title="A title", subtitle="A subtitle", layers=layers)
    html = path.read_text(encoding="utf-8")
    page = outline(html)
    assert "A title" in page.words
    assert "A subtitle" in page.words
    assert page.tags.count("tr") == 1 + len(rows)
    for row in rows:
        assert f'<td data-value="{float(row["perplexity"])}"' in html.replace(' class="best"', "")
    assert 'aria-label="Perplexity against bytes on disk"' in html
    assert 'aria-label="Perplexity against bytes, near"' in html
    for method in layers:
        assert f'aria-label="Kept by {method}"' in html
    assert "http:" not in html
    assert "https:" not in html


def test_best_of_each_budget_is_bold(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    html = comparison_report(rows, tmp_path / "a.html", title="t", subtitle="s").read_text(encoding="utf-8")
    best = [row["perplexity"] for row in rows if row["method"] == "auto"]
    assert len(best) == 2
    for value in best:
        assert f'<td class="best" data-value="{value}">' in html
    assert '<td class="best" data-value="14.1">' not in html


def test_one_budget_is_drawn_as_bars(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    single = [row for row in rows if row["budget"] != "0.6"]
    html = comparison_report(single, tmp_path / "a.html", title="t", subtitle="s").read_text(encoding="utf-8")
    start = html.index('aria-label="Decode, tokens/s"')
    assert html[start : html.index("</svg>", start)].count("<rect") == len(single)


@pytest.mark.parametrize("rows", [[], [{"method": "original", "bytes_disk": 5, "perplexity": 3.0}]])
def test_nothing_to_compare_is_an_error(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        comparison_report(rows, tmp_path / "a.html", title="t", subtitle="s")
    assert list(tmp_path.iterdir()) == []


def test_missing_and_infinite_figures_are_said(tmp_path: Path, outline: Callable[[str], Any]) -> None:
    rows = [
        {"method": "a", "bytes_disk": 10, "perplexity": math.inf},
        {"method": "b"},
        {},
        {"method": "c", "bytes_disk": 9, "perplexity": 20.0, "seconds": math.nan},
    ]
    path = comparison_report(rows, tmp_path / "a.html", title="t", subtitle="s")
    text = outline(path.read_text(encoding="utf-8")).words
    assert "Not drawn, for want of finite figures: a, b, unnamed." in text
    assert "∞" in text
    only = comparison_report([{"method": "b"}], tmp_path / "b.html", title="t", subtitle="s")
    assert "Not drawn, for want of finite figures: b." in outline(only.read_text(encoding="utf-8")).words


def test_hostile_rows_stay_text(
    rows: list[dict[str, Any]], records: list[dict[str, Any]], tmp_path: Path, outline: Callable[[str], Any]
) -> None:
    hostile = "\"'></svg><script>alert(1)</script><img src=x onerror=alert(1)>"
    for row in rows[1:]:
        row["method"] += hostile
        row["folder"] = row["budget"] = hostile
    path = comparison_report(rows, tmp_path / "a.html", title=hostile, subtitle=hostile, layers={hostile: records})
    page = outline(path.read_text(encoding="utf-8"))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags


def test_pareto_front_keeps_what_nothing_beats() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 6.0), (3.0, 5.0), (4.0, 7.0), (5.0, 1.0)]
    assert pareto_front(points) == [(1.0, 9.0), (2.0, 5.0), (5.0, 1.0)]
    for point in points:
        beaten = any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)
        assert beaten == (point not in pareto_front(points))


def test_runs_need_both_figures() -> None:
    rows = [
        {"bytes_disk": 1, "perplexity": 0.0},
        {"bytes_disk": 1},
        {"perplexity": 2.0},
        {"bytes_disk": 1, "perplexity": 2},
    ]
    assert [(run.bytes, run.value) for run in runs_of(rows)] == [(1.0, 2.0)]
