"""Allocation by measured divergence: what is measured, what is remembered, and that it beats adding errors up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import eckart
import tiny
from eckart.allocation import Budget
from eckart.calibration.subject import InMemory
from eckart.compression import method_for
from eckart.jobs.engine import Engine
from eckart.jobs.solve import Fitted, Task, Threads, fit
from eckart.jobs.trial import Trial

SEARCH = "evolutionary(generations=4, offspring=4, survivors=(2, 1), tokens=(16, 1000), levels=4)"
SETTINGS = {"num_hidden_layers": 2}


class Counting(Threads):
    """Keeps what was fitted."""

    def __init__(self) -> None:
        super().__init__(1)
        self.fits: list[tuple[str, str]] = []

    def map(self, function: Any, tasks: Iterable[Task]) -> Iterator[Any]:
        def noted() -> Iterator[Task]:
            for task in tasks:
                if function is fit:
                    self.fits.append((task.name, task.form))
                yield task

        return super().map(function, noted())


def engine(allocation: str, work: Path, model: Any = None, **settings: Any) -> Engine:
    chosen = method_for("svd_llm", allocation=allocation)
    batches = tiny.batches((2,) * 9, length=16, padded=True)[: 9 if chosen.tries_plans else 8]
    return Engine(InMemory(model or tiny.build("llama", **SETTINGS)), chosen, Budget.parse("0.75"), batches, work, **settings)  # fmt: skip # noqa: E501


def divergence(model: Any, original: Any, batches: list[dict[str, Any]]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            p, q = (m(**batch).logits.float().log_softmax(-1) for m in (original, model))
            real = batch["attention_mask"].bool()
            total += float((F.kl_div(q, p, reduction="none", log_target=True).sum(-1) * real).sum())
            count += int(real.sum())
    return total / count


@pytest.mark.parametrize("targets", ["", ".*(mlp.*_proj|lm_head)"])
def test_the_divergence_is_that_of_the_compressed_model(targets: str, tmp_path: Path) -> None:
    chosen = method_for("svd_llm", allocation=SEARCH, targets=targets)
    batches = tiny.batches((2,) * 9, length=16, padded=True)
    model = tiny.build("llama", **SETTINGS)
    made = Engine(InMemory(model), chosen, Budget.parse("0.8"), batches, tmp_path)
    plan = made.plan()
    assert made.job.trial is not None
    found = [made.job.trial(chosen, plan, measure="divergence", keep=keep) for keep in (True, False)]
    made.fit(plan)
    wanted = divergence(model, tiny.build("llama", **SETTINGS), batches[-1:])
    assert found == pytest.approx([wanted, wanted], rel=2e-4)


def test_a_search_within_the_budget_is_no_worse_than_where_it_started(tmp_path: Path) -> None:
    values = {}
    for allocation in (SEARCH, "dynamic_programming()", "uniform()"):
        model = tiny.build("llama", **SETTINGS)
        (tmp_path / allocation[:4]).mkdir()
        made = engine(allocation, tmp_path / allocation[:4], model)
        run = made.fit(made.plan())
        assert run.plan.bytes_after <= run.plan.budget
        values[allocation] = divergence(model, tiny.build("llama", **SETTINGS), tiny.batches((2,) * 9, length=16, padded=True)[-1:])  # fmt: skip # noqa: E501
    assert values[SEARCH] <= min(values.values()) * (1 + 1e-6)
    assert values[SEARCH] < 0.99 * max(values.values())


def test_no_layer_is_fitted_twice_while_plans_are_tried(tmp_path: Path) -> None:
    executor = Counting()
    made = engine(SEARCH, tmp_path, executor=executor)
    plan = made.plan()
    assert len(executor.fits) == len(set(executor.fits)) > 14
    assert made.job.fits is None
    tried = len(executor.fits)
    made.fit(plan)
    assert len(executor.fits) > tried  # and the end result is fitted as by any other allocation


def test_a_job_that_was_killed_while_it_searched_goes_on(tmp_path: Path) -> None:
    class Killed(Counting):
        def map(self, function: Any, tasks: Iterable[Task]) -> Iterator[Fitted]:
            if function is fit and (tmp_path / "b" / "trial" / "search.json").exists():
                raise KeyboardInterrupt
            return super().map(function, tasks)

    for name in "ab":
        (tmp_path / name).mkdir()
    whole = engine(SEARCH, tmp_path / "a").plan()
    with pytest.raises(KeyboardInterrupt):
        engine(SEARCH, tmp_path / "b", executor=Killed()).plan()
    again = engine(SEARCH, tmp_path / "b").plan()
    assert [layer.form for layer in again.layers] == [layer.form for layer in whole.layers]
    kept = [(tmp_path / name / "trial" / "search.json").read_text() for name in "ab"]
    assert kept[0] == kept[1]


def test_windows_are_drawn_anew_and_the_same_ones_for_the_same_draw(tmp_path: Path) -> None:
    trial = engine(SEARCH, tmp_path).job.trial
    drawn = trial.drawn  # type: ignore[union-attr]
    assert len(trial.batches) == 2  # type: ignore[union-attr]
    assert drawn(None, 0) == drawn(10**6, 3) == [0, 1]
    assert {tuple(drawn(1, i)) for i in range(20)} == {(0,), (1,)}
    assert drawn(1, 5) == drawn(1, 5)
    with pytest.raises(ValueError, match="measure='x': it is 'loss' or 'divergence' or 'squares'"):
        trial(None, None, measure="x")  # type: ignore[misc, arg-type]


def test_a_choice_is_tried_once_on_the_same_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, whole = [], Trial.__call__

    def call(self: Trial, method: Any, plan: Any, *, tokens: int, draw: int, **more: Any) -> float:
        tried.append((*(layer.form for layer in plan.layers), *self.drawn(tokens, draw)))
        return whole(self, method, plan, tokens=tokens, draw=draw, **more)

    monkeypatch.setattr(Trial, "__call__", call)
    engine(SEARCH, tmp_path).plan()
    assert len(tried) == len(set(tried)) > 10


def test_a_search_without_text_is_refused() -> None:
    with pytest.raises(ValueError, match="measures plans on calibration data: give at least two batches"):
        eckart.compress(tiny.build("llama", **SETTINGS), "svd", allocation=SEARCH, budget=0.8)
