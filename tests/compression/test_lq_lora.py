"""LQ-LoRA against its card: the Fisher identity, the order of decompositions, the integer programme, the model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import eckart
import tiny
from eckart.allocation import BudgetError
from eckart.compression.lq_lora import LQLoRA, configurations
from eckart.forms import Dense, Form, LowRank, OneOf, parse
from eckart.forms.in_turn import InTurn
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import DiagonalRoot
from eckart.testing import gaussian

RANK = 16
QUANTISER = parse("quantized(bits=3, group=32, grid=normal_float())")
W = gaussian(96, RANK, seed=1) @ gaussian(RANK, 128, seed=2) / 4 + gaussian(96, 128, seed=3)


def fisher() -> Weighting:
    """Weights of single errors, not of rank one, and their two-sided stand-in."""
    F = gaussian(96, 1, seed=4).exp() * gaussian(1, 128, seed=5).exp() * gaussian(96, 128, seed=6).mul(0.3).exp()
    return Weighting(DiagonalRoot(F.mean(1).sqrt()), DiagonalRoot(F.mean(0).sqrt()), each=F)


def test_under_a_fisher_of_rank_one_the_error_is_the_tail_of_the_scaled_spectrum() -> None:
    u, v = gaussian(24, seed=4, dtype=torch.float64).exp(), gaussian(32, seed=5, dtype=torch.float64).exp()
    A, F = gaussian(24, 32, seed=6, dtype=torch.float64), u[:, None] * v
    R, C = F.mean(1).sqrt(), F.mean(0).sqrt()
    weighting = Weighting(DiagonalRoot(R), DiagonalRoot(C), each=F)
    constant = float((F.sqrt() / (R[:, None] * C))[0, 0])
    tail = torch.linalg.svdvals(R[:, None] * A * C)[5:].square().sum().sqrt()
    found = weighting.norm2(A - LowRank(5).fit(A, weighting).dense().detach()) ** 0.5
    assert found == pytest.approx(constant * float(tail), rel=1e-10)
    assert found < weighting.norm2(A - LowRank(5).fit(A).dense().detach()) ** 0.5


@pytest.mark.parametrize("weighting", [Weighting(), fisher()], ids=["plain", "fisher"])
def test_alternating_beats_one_pass_beats_repair_beats_rounding(weighting: Weighting) -> None:
    low = LowRank(RANK)

    def error(form: Form) -> float:
        return weighting.norm2(W - form.fit(W, weighting).dense().detach())

    converged, once = error(InTurn(low, QUANTISER, 100)), error(InTurn(low, QUANTISER))
    assert converged < once < error(InTurn(QUANTISER, low)) < error(QUANTISER)


@pytest.mark.parametrize("weighting", [Weighting(), fisher()], ids=["plain", "fisher"])
def test_the_objective_never_grows_with_the_iterations(weighting: Weighting) -> None:
    errors = [
        weighting.norm2(W - InTurn(LowRank(8), QUANTISER, n).fit(W, weighting).dense().detach()) for n in range(1, 9)
    ]
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[3] < errors[0]


def test_bits_of_the_configurations() -> None:
    """b + b0 / B0 + bits(b1) / (B0 B1), and what the second level keeps besides its scale: a zero of b0 bits."""
    forms = configurations()
    assert isinstance(forms, OneOf)
    assert len(forms.ladder((256, 256))) == 18
    for form, group in zip(forms.forms, (16, 32, 64), strict=True):
        closed = form.ladder((256, 256))[0]
        groups = 256 * 256 // group
        assert closed.nbytes((256, 256), torch.bfloat16) == (2 * 256 * 256 + 8 * groups + (16 + 8) * groups // 256) // 8


def test_the_programme_mixes_configurations_within_the_budget_and_beats_every_single_one_that_fits() -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    choices = [f"quantized(bits={bits}, group=16, grid=normal_float())" for bits in (2, 3, 4, 6)]
    result = eckart.compress(model, "lq_lora", form=" | ".join(choices), budget="0.38 linears", rank=2, sweeps=3).result
    assert result.bytes_after <= result.budget
    chosen = [layer for layer in result.layers if not isinstance(parse(layer.form), Dense)]
    assert len({layer.form for layer in chosen}) > 1
    allowed, singles = sum(layer.bytes for layer in result.layers), []
    for choice in choices:
        form = parse(f"in_turn(first=low_rank(rank=2), second={choice}, sweeps=3)")
        if sum(form.nbytes(layer.shape, torch.float32) for layer in result.layers) <= allowed:
            own = [weights[f"{layer.name}.weight"] for layer in result.layers]
            singles.append(sum(float((w - form.fit(w).dense().detach()).square().sum()) for w in own))
    assert singles
    assert sum(layer.measured_error for layer in result.layers) < min(singles)


def test_after_installation_a_layer_computes_the_sum() -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    quantiser = "quantized(bits=3, group=16, grid=normal_float())"
    eckart.compress(model, "lq_lora", form=quantiser, budget="0.6 linears", rank=4, sweeps=2)
    layer, x = model.model.layers[0].mlp.up_proj, gaussian(3, 32, seed=9)
    low, rounded = (term.dense() for term in layer.matrix.terms)
    assert int(torch.linalg.matrix_rank(low)) == 4
    torch.testing.assert_close(layer(x), x @ (low + rounded).T, rtol=1e-5, atol=1e-5)
    assert {p.dtype for p in layer.matrix.terms[0].parameters()} == {torch.float32}


def test_a_rank_wider_than_the_layer_is_cut_to_it_and_zero_is_the_quantiser_alone() -> None:
    model = tiny.build("llama")
    name = "model.layers.0.self_attn.k_proj"  # 16 x 32
    form = LQLoRA(form=QUANTISER).form_of(model, name)
    assert isinstance(form, InTurn)
    assert form.first == LowRank(16)
    assert LQLoRA(form=QUANTISER, rank=0).form_of(model, name) == QUANTISER
    assert isinstance(LQLoRA().form_of(model, name), OneOf)


def test_a_budget_below_the_smallest_size_is_refused() -> None:
    with pytest.raises(BudgetError, match="the smallest possible is"):
        eckart.compress(tiny.build("llama", num_hidden_layers=1), "lq_lora", form="quantized(bits=4) | quantized(bits=3)", budget="0.05 linears", sweeps=1)  # fmt: skip # noqa: E501
