"""The wrapper hands the model and every setting to lm-eval, and says how to install it."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from eckart.evaluation.lm_eval import run_lm_eval


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A package called lm_eval that records how it is called."""
    seen: dict[str, Any] = {}
    package, adapter = ModuleType("lm_eval"), ModuleType("lm_eval.models.huggingface")

    def simple_evaluate(**settings: Any) -> dict[str, Any]:
        seen.update(settings)
        return {"results": {task: {"acc,none": 0.5} for task in settings["tasks"]}, "config": {}}

    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    adapter.HFLM = lambda **settings: ("HFLM", settings)  # type: ignore[attr-defined]
    for name, module in {"lm_eval": package, "lm_eval.models": ModuleType("m"), adapter.__name__: adapter}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_the_model_and_the_settings_arrive(calls: dict[str, Any]) -> None:
    model, tokenizer = object(), object()
    found = run_lm_eval(model, tokenizer, ["arc_easy", "piqa"], num_fewshot=3, limit=10, batch_size=2, seed=7)
    assert found == {"arc_easy": {"acc,none": 0.5}, "piqa": {"acc,none": 0.5}}
    assert calls["model"] == ("HFLM", {"pretrained": model, "tokenizer": tokenizer, "batch_size": 2})
    assert (calls["tasks"], calls["num_fewshot"], calls["limit"]) == (["arc_easy", "piqa"], 3, 10)
    assert {calls[key] for key in calls if key.endswith("seed")} == {7}


def test_a_process_that_is_not_the_first(calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["lm_eval"], "simple_evaluate", lambda **_: None)
    assert run_lm_eval(object(), object(), ["piqa"]) == {}


def test_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'eckart\[eval\]'"):
        run_lm_eval(object(), object(), ["piqa"])


@pytest.mark.parametrize("tasks", [[], "piqa"])
def test_tasks_are_a_list(tasks: Any) -> None:
    with pytest.raises(ValueError, match="at least one task"):
        run_lm_eval(object(), object(), tasks)
