"""An allocation that looks at bytes alone: one rung of a layer is fitted, the one that whole curves would give."""

from __future__ import annotations

from typing import Any

import pytest

import eckart
import tiny
from eckart.allocation.uniform import Uniform
from eckart.forms.quantized import Quantized


@pytest.mark.parametrize("method", ["rtn", "gptq", "sparsegpt", "squeezellm"])
def test_the_choice_is_that_of_whole_curves(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for needs in (True, False):
        monkeypatch.setattr(Uniform, "needs_errors", needs)
        result = eckart.compress(tiny.build("llama"), method, budget=0.6, data=tiny.batches()).result
        found.append([(layer.form, layer.bytes, layer.measured_error) for layer in result.layers])
    assert found[0] == found[1]


def test_one_rung_of_a_layer_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    whole = Quantized.fit

    def fit(self: Quantized, *args: Any, **more: Any) -> Any:
        fits.append(self.bits)
        return whole(self, *args, **more)

    monkeypatch.setattr(Quantized, "fit", fit)
    result = eckart.compress(tiny.build("llama"), "rtn", budget=0.5).result
    assert len(fits) == 2 * len(result.layers)
    assert all(layer.predicted_error == pytest.approx(layer.measured_error, rel=1e-5) for layer in result.layers)


def test_alternatives_are_still_weighed_by_their_errors() -> None:
    form = "quantized(bits=4, group=16) | quantized(bits=1, group=2)"  # the second is dearer, and worse
    result = eckart.compress(tiny.build("llama"), form=form, budget=0.9, allocation="uniform()").result
    assert {layer.form for layer in result.layers} == {"quantized(bits=4, group=16)"}


@pytest.mark.parametrize("budget", [0.4, 0.42, 0.44, 0.5])
def test_names_of_a_cheaper_alternative_may_take_more_bytes(budget: float) -> None:
    """Of two alternatives the cheaper one has more tensors, whose names and shapes count."""
    form = "quantized(bits=8, group=None, grid=uniform(symmetric=True)) | rotated(pyramid(pulses=6))"
    result = eckart.compress(tiny.build("llama"), form=form, budget=budget, allocation="optimal()").result
    assert any("rotated" in layer.form for layer in result.layers)
    assert result.bytes_after <= result.budget
