"""DSFormer's start on a layer and on a model: equal codes in every block of inputs, and the order against SVD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import eckart
import tiny
from eckart.forms import SemiSparse
from eckart.forms.block_dictionary import BlockDictionary
from eckart.forms.layers import DropIn

FORM = "block_dictionary(atoms=32, block=32, iterations=8)"


class One(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def lost(weight: Tensor, key: str, **settings: Any) -> float:
    model, result = eckart.compress(One(weight.clone()), key, budget=0.6, **settings)
    assert result.bytes_after <= 0.6 * result.bytes_before
    layer: Any = model.get_submodule("layer")
    return float((layer.weight - weight).square().sum() / weight.square().sum())


def test_wins_where_blocks_differ_and_loses_where_they_are_one() -> None:
    weight = normal(160, 96, seed=0)
    assert lost(weight, "dsformer", form=FORM) < 0.7 * lost(weight, "svd")
    globally_low = normal(160, 20, seed=1) @ normal(20, 96, seed=2) + 0.1 * normal(160, 96, seed=3)
    assert lost(globally_low, "svd") < lost(globally_low, "dsformer", form=FORM)


def test_codes_have_equally_many_entries_in_every_block() -> None:
    model, _ = eckart.compress(One(normal(160, 96, seed=0)), "dsformer", form=FORM, budget=0.6)
    layer: Any = model.get_submodule("layer")
    codes = layer.matrix.left
    assert isinstance(layer.matrix.form, BlockDictionary)
    assert codes.form == SemiSparse(layer.matrix.form.nonzeros, 32)
    counts = torch.bincount(codes.flat() // 32, minlength=160 * 3)
    assert torch.equal(counts, torch.full((480,), layer.matrix.form.nonzeros))


def test_a_model_without_data() -> None:
    form = "block_dictionary(atoms=8, block=8, iterations=3)"
    model, result = eckart.compress(tiny.build("bert", num_hidden_layers=1), "dsformer", form=form, budget=0.85)
    assert result.bytes_after <= 0.85 * result.bytes_before
    assert any(isinstance(m, DropIn) for m in model.modules())
    assert bool(torch.isfinite(model(**tiny.batches()[0]).logits).all())


def test_more_entries_than_atoms_are_refused() -> None:
    with pytest.raises(ValueError, match="a code has at most 4 entries"):
        eckart.compress(One(normal(9, 9, seed=0)), "dsformer", form="block_dictionary(nonzeros=5, atoms=4)", budget=0.9)
