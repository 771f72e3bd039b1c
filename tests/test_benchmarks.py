"""How benchmarks search a learning rate, and go on with what a file lacks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import tiny

RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


@pytest.fixture(scope="module")
def common() -> Any:
    return tiny.benchmark("common")


def walked(common: Any, best: float) -> list[float]:
    """The rates that are tried where scores fall to both sides of the best."""
    scores: dict[float, float] = {}
    while (lr := common.next_rate(RATES, scores)) is not None:
        assert lr not in scores
        scores[lr] = -abs(math.log(lr / best))
    return list(scores)


@pytest.mark.parametrize("best", RATES)
def test_the_best_rate_is_found_and_both_its_neighbours_are_tried(common: Any, best: float) -> None:
    tried, place = walked(common, best), RATES.index(best)
    assert tried[0] == 1e-3
    assert {*RATES[max(0, place - 1) : place + 2]} <= {*tried}
    assert common.at_edge(RATES, best) == ("*" if place in (0, 4) else "")


def test_a_search_goes_on_where_it_was_cut_off_and_judges_seeds_at_the_best_rate(common: Any) -> None:
    ran: list[tuple[float, int, str]] = []
    saved: list[int] = []

    def run(lr: float, seed: int, part: str) -> dict[str, Any]:
        ran.append((lr, seed, part))
        return {"score": (-abs(math.log(lr / 3e-3)), 0.0), "lr": lr}

    row: dict[str, Any] = {"sweep": {}, "runs": {}}
    common.searched(row, RATES, [1, 2], run, lambda r: r["score"], lambda: saved.append(len(ran)))
    assert saved == list(range(1, len(ran) + 1))
    assert [r for r in ran if r[2] == "validation"] == [(lr, 0, "validation") for lr in (1e-3, 3e-4, 3e-3, 1e-2)]
    assert ran[4:] == [(3e-3, 1, "test"), (3e-3, 2, "test")]
    del row["runs"]["2"], row["sweep"][str(1e-2)], ran[:]
    common.searched(row, RATES, [1, 2], run, lambda r: r["score"], lambda: None)
    assert ran == [(1e-2, 0, "validation"), (3e-3, 2, "test")]


def test_where_every_rate_fails_no_seed_is_run(common: Any) -> None:
    row: dict[str, Any] = {"sweep": {}, "runs": {}}
    common.searched(row, RATES, [1], lambda *_: {"error": "no"}, common.accuracy_of, lambda: None)
    assert row["sweep"]
    assert not row["runs"]


def test_where_nothing_is_learned_at_first_the_loss_leads_to_the_rate_that_does(common: Any) -> None:
    row: dict[str, Any] = {"sweep": {}, "runs": {}}

    def run(lr: float, seed: int, part: str) -> dict[str, Any]:
        return {"accuracy": 0.9 if lr < 5e-4 else 0.73, "loss": lr, "lr": lr}

    common.searched(row, [*RATES, 3e-2, 1e-1], [1], run, common.accuracy_of, lambda: None)
    assert [*row["sweep"]] == [str(lr) for lr in (3e-3, 1e-3, 3e-4, 1e-4)]
    assert row["runs"]["1"]["lr"] == 1e-4


@pytest.mark.parametrize(("words", "rates"), [([], [1e-3, 3e-3, 1e-2]), (["--quick"], [3e-3])])
def test_a_quick_search_takes_the_middle_of_the_grid(
    common: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], rates: list[float]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", "--rates", "1e-2", "1e-3", "3e-3", *words])
    chosen, _ = common.search_chosen(common.search_options("doc", "file.json", RATES, "little"))
    assert chosen.rates == rates
    assert chosen.json == Path("file.json")


def test_a_report_of_other_settings_is_left_alone(common: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    report = common.opened(file, {"steps": 3, "seed": 0})
    common.write_json(report | {"rows": {"a": 1}}, file)
    assert common.opened(file, {"steps": 3, "seed": 0})["rows"] == {"a": 1}
    before = file.read_bytes()
    with pytest.raises(SystemExit, match=r"report\.json holds runs with other settings \(steps\): name another file"):
        common.opened(file, {"steps": 4, "seed": 0})
    assert file.read_bytes() == before
