"""CoSpaDi on a layer and on a model: every output unit has its own few atoms, and loses less than by truncation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eckart
import tiny
from eckart.forms.column_sparse import RowSparse
from eckart.forms.dictionary import Dictionary
from eckart.forms.layers import DropIn


def correlated(tokens: int, width: int = 48, seed: int = 0) -> Tensor:
    mix = torch.logspace(0, -1, width)[:, None] * torch.randn(width, width, generator=torch.Generator().manual_seed(9))
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) @ mix.T


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 160, bias=False)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def compressed(key: str, **settings: Any) -> tuple[nn.Module, Any]:
    return eckart.compress(One(), key, data=[{"x": correlated(400)}], **settings)


def output_error(model: nn.Module) -> float:
    x = correlated(500, seed=50)
    return float((model(x) - One()(x)).detach().square().sum() / One()(x).detach().square().sum())


@pytest.mark.parametrize("budget", [0.8, 0.6])
def test_loses_less_than_truncation_at_equal_bytes_all_counted(budget: float) -> None:
    dictionary, result = compressed("cospadi", form="dictionary(iterations=10)", budget=budget)
    assert result.bytes_after <= budget * result.bytes_before
    truncated, _ = compressed("svd_llm", budget=budget)
    assert output_error(dictionary) < 0.7 * output_error(truncated)


def test_every_output_unit_has_its_atoms() -> None:
    model, _ = compressed("cospadi", form="dictionary(iterations=5, ratio=3)", budget=0.6)
    layer: Any = model.get_submodule("layer")
    form = layer.matrix.form
    assert isinstance(form, Dictionary)
    assert isinstance(layer.matrix.left.form, RowSparse)
    places = layer.matrix.left.flat() // (form.atoms or 0)
    assert torch.equal(torch.bincount(places), torch.full((160,), (form.atoms or 0) // 3))


def test_knowing_the_inputs_pays() -> None:
    form = "dictionary(atoms=45, iterations=10)"
    informed, _ = compressed("cospadi", form=form, budget=0.9)
    blind, _ = compressed("cospadi", form=form, metric="plain()", budget=0.9)
    assert output_error(informed) < 0.6 * output_error(blind)


def test_a_model() -> None:
    model, result = eckart.compress(
        tiny.build("llama", num_hidden_layers=1),
        "cospadi",
        form="dictionary(iterations=3)",
        budget=0.85,
        data=tiny.batches(),
    )
    assert result.bytes_after <= 0.85 * result.bytes_before
    assert any(isinstance(m, DropIn) for m in model.modules())
    assert bool(torch.isfinite(model(**tiny.batches()[0]).logits).all())


def test_more_entries_than_atoms_are_refused() -> None:
    with pytest.raises(ValueError, match="the ratio is at least 1"):
        compressed("cospadi", form="dictionary(ratio=0.9)", budget=0.8)
