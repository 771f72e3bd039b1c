"""Alternatives: their text, their merged curve, and what a budget makes of them."""

from __future__ import annotations

import pytest
import torch

import eckart
import tiny
from eckart.forms import Dense, LowRank, OneOf, Quantized, parse
from eckart.linalg.weighting import PLAIN
from eckart.testing.numbers import gaussian

BOTH = "low_rank() | quantized(group=8)"


def test_text_and_back() -> None:
    form = parse(BOTH)
    assert form == LowRank() | Quantized(group=8)
    assert str(form) == BOTH
    assert form.open
    assert parse("low_rank() | quantized() | low_rank()") == OneOf((LowRank(), Quantized()))
    assert parse("diagonal() + low_rank() | quantized()") == OneOf((parse("diagonal() + low_rank()"), Quantized()))
    with pytest.raises(ValueError, match="cannot be combined"):
        parse("low_rank() | uniform()")


def test_a_sum_or_product_with_alternatives_is_alternatives() -> None:
    form = parse(f"({BOTH}) + diagonal()")
    assert form == parse("low_rank() + diagonal() | quantized(group=8) + diagonal()")
    assert parse(str(form)) == form
    assert parse("dense(4) @ (diagonal() | select())") == parse("dense(4) @ diagonal() | dense(4) @ select()")


def test_the_curve_keeps_the_best_of_all_and_nothing_that_is_beaten() -> None:
    W = gaussian(24, 16)
    merged = parse(BOTH).curve(W, PLAIN, torch.float32)
    own = [parse(text).curve(W, PLAIN, torch.float32) for text in BOTH.split(" | ")]
    assert merged.nbytes == sorted(set(merged.nbytes))
    assert merged.errors == sorted(merged.errors, reverse=True)
    for curve in own:
        for nbytes, error in zip(curve.nbytes, curve.errors, strict=True):
            assert any(n <= nbytes and e <= error for n, e in zip(merged.nbytes, merged.errors, strict=True))
    assert merged.spectrum is not None


def test_it_is_not_fitted_itself() -> None:
    with pytest.raises(ValueError, match="alternatives are decided by a budget"):
        parse(BOTH).build((4, 4))
    with pytest.raises(ValueError, match="alternatives are decided by a budget"):
        parse(BOTH).fit(gaussian(4, 4))


def test_a_budget_is_spent_on_the_better_form_of_each_weight() -> None:
    """Weights of low rank get low rank, others bits."""
    model = tiny.build("llama")
    low = gaussian(*model.model.layers[0].mlp.up_proj.weight.shape[:1], 2) @ gaussian(
        2, model.model.layers[0].mlp.up_proj.weight.shape[1], seed=1
    )
    model.model.layers[0].mlp.up_proj.weight.data = low / low.norm()
    done = eckart.compress(model, form=BOTH, metric="plain()", allocation="optimal()", budget="0.6")
    forms = {layer.name: parse(layer.form) for layer in done.result.layers}
    assert isinstance(forms["model.layers.0.mlp.up_proj"], LowRank)
    assert any(isinstance(form, Quantized) for form in forms.values())
    assert not any(isinstance(form, Dense) for form in list(forms.values())[:1])
