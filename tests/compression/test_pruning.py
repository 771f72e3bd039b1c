"""Magnitude, Wanda and SparseGPT on whole models: what is kept, in which order they lose, and honest bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eckart
import tiny
from eckart.forms import GroupSparse, SemiSparse, Sparse, parse
from eckart.forms.layers import DropIn, FactoredLinear
from eckart.forms.selections import OBS, Wanda
from eckart.forms.sparse import SparseMatrix
from eckart.registry import entries

METHODS = ["magnitude", "wanda", "sparsegpt"]


def correlated(tokens: int, width: int = 24, seed: int = 0) -> Tensor:
    mix = torch.logspace(0, -1.5, width)[:, None] * torch.randn(width, width, generator=torch.Generator().manual_seed(9))  # fmt: skip # noqa: E501
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) @ mix.T


class One(nn.Module):
    """One layer whose inputs are correlated and of different sizes."""

    def __init__(self, seed: int = 1):
        super().__init__()
        self.layer = nn.Linear(24, 20, bias=False)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def pruned(key: str, **settings: Any) -> tuple[nn.Module, Any]:
    batches = [{"x": correlated(64, seed=s)} for s in range(3)]
    return eckart.compress(One(), key, data=batches, **{"budget": 0.6, **settings})


def output_error(model: nn.Module) -> float:
    x = correlated(500, seed=50)
    return float((model(x) - One()(x)).detach().square().sum())


def matrix(model: nn.Module) -> SparseMatrix:
    layer: Any = model.get_submodule("layer")
    assert isinstance(layer, FactoredLinear)
    assert isinstance(layer.matrix, SparseMatrix)
    return layer.matrix


def test_they_are_in_the_catalogue() -> None:
    known = {e.key: e for e in entries("compression")}
    for key in METHODS:
        assert known[key].family == "sparse"
        assert "arXiv" in known[key].paper


def test_their_output_errors_are_in_the_order_of_what_they_know() -> None:
    for form in ("sparse(density=0.5, selection={})", "semi_sparse(selection={})"):
        errors = [
            output_error(pruned(key, form=form.format(word), budget=0.9)[0])
            for key, word in zip(METHODS, ("magnitude()", "wanda()", "obs()"), strict=True)
        ]
        assert errors[2] < 0.8 * errors[1] < errors[0] * 0.8 * 0.9


def test_magnitude_needs_no_data() -> None:
    model, result = eckart.compress(One(), "magnitude", budget=0.6)
    kept = matrix(model).dense().detach()
    w = One().layer.weight.detach()
    assert float(w[kept == 0].abs().max()) <= float(w[kept != 0].abs().min())
    assert torch.equal(kept[kept != 0], w[kept != 0])
    assert result.bytes_after <= 0.6 * result.bytes_before + 1


@pytest.mark.parametrize("key", ["wanda", "sparsegpt"])
def test_the_others_ask_for_data(key: str) -> None:
    with pytest.raises(ValueError, match=r"data|calibrat"):
        eckart.compress(One(), key, budget=0.6)


def test_wandas_rows_keep_equally_many_of_the_best_scores() -> None:
    model, _ = pruned("wanda", budget=0.7)
    dense = matrix(model).dense().detach()
    counts = (dense != 0).sum(1)
    assert int(counts.max() - counts.min()) <= 1
    x = torch.cat([correlated(64, seed=s) for s in range(3)])
    scores = One().layer.weight.detach().abs() * x.norm(dim=0)
    for row, score in zip(dense, scores, strict=True):
        assert float(score[row == 0].max()) <= float(score[row != 0].min()) * (1 + 1e-3)


@pytest.mark.parametrize("key", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whole_models_meet_the_budget_and_count_what_they_store(key: str, family: str) -> None:
    model = tiny.build(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 1})
    model, result = eckart.compress(model, key, budget=0.8, data=tiny.batches())
    assert result.bytes_after <= 0.8 * result.bytes_before
    layers = [m for m in model.modules() if isinstance(m, DropIn)]
    assert layers
    for layer in layers:
        assert isinstance(layer.matrix, SparseMatrix)
        assert int((layer.matrix.dense() != 0).sum()) <= layer.matrix.values.numel()
        size = layer.matrix.shape[0] * layer.matrix.shape[1]
        assert layer.matrix.nbytes < 4 * size
    logits = model(**tiny.batches()[0]).logits
    assert bool(torch.isfinite(logits).all())


def test_forms_of_other_patterns_take_any_selection() -> None:
    for form, kind in (
        (SemiSparse(selection=Wanda()), SemiSparse),
        (GroupSparse(0.5, 4, OBS()), GroupSparse),
        (Sparse(0.4, OBS(per_row=True)), Sparse),
    ):
        model, _ = pruned("sparsegpt", form=str(form), budget=0.9)
        assert isinstance(matrix(model).form, kind)
        assert parse(str(matrix(model).form)) == form


def test_the_second_layer_sees_what_the_first_one_lost() -> None:
    """Block by block on the pruned model, as the papers do; at once, if asked."""
    settings: dict[str, Any] = {"form": "semi_sparse(selection=obs())", "budget": 0.9, "data": tiny.batches()}
    plain, _ = eckart.compress(tiny.build("llama", num_hidden_layers=2), "sparsegpt", one_shot=True, **settings)
    in_turn, _ = eckart.compress(tiny.build("llama", num_hidden_layers=2), "sparsegpt", **settings)
    first = "model.layers.0.self_attn.q_proj"
    last = "model.layers.1.mlp.up_proj"
    assert torch.equal(plain.get_submodule(first).weight, in_turn.get_submodule(first).weight)
    assert not torch.equal(plain.get_submodule(last).weight, in_turn.get_submodule(last).weight)
