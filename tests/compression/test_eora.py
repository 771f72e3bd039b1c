"""EoRA against its card: the tail of the projected spectrum, the order of repairs, and the limits of the rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import eckart
import tiny
from eckart.allocation import BudgetError
from eckart.compression.eora import EoRA
from eckart.forms import Dense, Form, LowRank, Quantized, parse
from eckart.forms.in_turn import InTurn
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import Damped, DiagonalRoot, psd_root
from eckart.metrics import InputCovariance
from eckart.testing import gaussian

OUT, IN = 24, 32
W = gaussian(OUT, IN, seed=1, dtype=torch.float64)
QUANTISER = Quantized(3, group=16)


def inputs(tokens: int = 96) -> Tensor:
    """(tokens, in), correlated, of very different sizes."""
    mix = torch.logspace(0, -1.5, IN, dtype=torch.float64)[:, None] * gaussian(IN, IN, seed=2, dtype=torch.float64)
    return gaussian(tokens, IN, seed=3, dtype=torch.float64) @ mix.T


def output_error(form: Form, X: Tensor, weighting: Weighting) -> float:
    """|| (W - Ŵ) Xᵀ ||_F."""
    return float(((W - form.fit(W, weighting).dense().detach()) @ X.T).norm())


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_error_is_the_tail_of_the_projected_spectrum(rank: int) -> None:
    X = inputs()
    weighting = Weighting(right=psd_root(X.T @ X, 0.0, "eigen"))
    values, Q = torch.linalg.eigh(X.T @ X)
    left = W - QUANTISER.fit(W, weighting).dense().detach()
    tail = torch.linalg.svdvals(left @ Q * values.sqrt())[rank:].square().sum().sqrt()
    assert output_error(InTurn(QUANTISER, LowRank(rank)), X, weighting) == pytest.approx(float(tail), rel=1e-6)


def test_beats_repairs_that_know_less_of_the_inputs() -> None:
    X = inputs()
    full = Weighting(right=psd_root(X.T @ X, 0.0))
    diagonal = Weighting(right=DiagonalRoot(X.square().mean(0).sqrt()))
    base = QUANTISER.fit(W, PLAIN).dense().detach()

    def repaired(weighting: Weighting) -> float:
        return float(((W - base - LowRank(6).fit(W - base, weighting).dense().detach()) @ X.T).norm())

    none = float(((W - base) @ X.T).norm())
    assert repaired(full) < repaired(diagonal) < repaired(PLAIN) < none


def test_full_rank_is_exact_and_a_scale_of_the_inputs_does_not_matter() -> None:
    X = inputs()
    full = InTurn(QUANTISER, LowRank(OUT)).fit(W, Weighting(right=psd_root(X.T @ X, 0.0))).dense().detach()
    torch.testing.assert_close(full, W, rtol=1e-9, atol=1e-9)
    a, b = (InTurn(QUANTISER, LowRank(4)).fit(W, Weighting(right=psd_root(c * X.T @ X, 0.0))).dense().detach() for c in (1.0, 1e4))  # fmt: skip # noqa: E501
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_fewer_tokens_than_inputs() -> None:
    X = inputs(10)
    with pytest.warns(Damped, match="saw 10 tokens for 32 inputs"):
        weighting = InputCovariance().of(X)
    fitted = InTurn(QUANTISER, LowRank(4)).fit(W, weighting)
    low = fitted._term(1).dense().detach()
    assert bool(torch.isfinite(low).all())
    assert float(low.norm()) < 10 * float(W.norm())
    base = fitted._term(0).dense().detach()
    plain = LowRank(4).fit(W - base).dense().detach()
    assert float(((W - base - low) @ X.T).norm()) <= float(((W - base - plain) @ X.T).norm()) * (1 + 1e-6)


def compressed(model: Any, **settings: Any) -> Any:
    return eckart.compress(model, "eora", data=tiny.batches((4,) * 6, length=16), **settings)


def test_compresses_a_model_and_the_repair_is_worth_its_bytes_in_its_own_metric() -> None:
    errors = {}
    for rank in (0, 4):
        model = tiny.build("llama", num_hidden_layers=2)
        result = compressed(model, budget=0.9, form="quantized(bits=3, group=16)", rank=rank).result
        errors[rank] = sum(layer.measured_error / layer.energy for layer in result.layers)
        assert all(parse(layer.form).open is False for layer in result.layers)
        logits = model(**tiny.batches((2,))[0]).logits
        assert bool(torch.isfinite(logits).all())
    assert errors[4] < 0.8 * errors[0]


def test_the_budget_sets_the_bits_and_is_kept() -> None:
    result = compressed(tiny.build("llama", num_hidden_layers=2), budget=0.66, rank=2).result
    assert result.bytes_after <= 0.66 * result.bytes_before
    forms = [parse(layer.form) for layer in result.layers]
    assert {f.second.rank for f in forms if isinstance(f, InTurn) and isinstance(f.second, LowRank)} == {2}
    assert not all(isinstance(f, Dense) for f in forms)


def test_rank_zero_is_the_compressor_alone_bit_for_bit() -> None:
    models = [tiny.build("llama", num_hidden_layers=2), tiny.build("llama", num_hidden_layers=2)]
    batches = tiny.batches((4,) * 4)
    eckart.compress(models[0], "eora", budget=0.9, data=batches, form="quantized(bits=4)", rank=0)
    eckart.compress(models[1], form="quantized(bits=4)", metric="input_covariance()", allocation="optimal()", budget=0.9, data=batches, one_shot=False)  # fmt: skip # noqa: E501
    state = models[1].state_dict()
    assert all(torch.equal(v, state[k]) for k, v in models[0].state_dict().items())


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"eora\(rank=-1\): the rank is a whole number, 0 for none"):
        EoRA(rank=-1)
    with pytest.raises(ValueError, match="needs calibration data"):
        eckart.compress(tiny.build("llama", num_hidden_layers=2), "eora", budget=0.9)


@pytest.mark.parametrize(
    ("rank", "told"), [(8, r"gptq\(\)\) and a low rank of 8 \(a smaller `rank`"), (0, r"gptq\(\)\) on these")]
)
def test_a_budget_that_cannot_be_met_names_the_rank(rank: int, told: str) -> None:
    with pytest.raises(BudgetError, match=told):
        eckart.compress(tiny.build("llama"), "eora", budget="0.2bpw", data=tiny.batches((4,) * 4), rank=rank)
