"""What a recipe says of the weights it leaves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eckart
import mixtures
import tiny


def test_weights_that_no_form_can_stand_for_are_listed_as_dense() -> None:
    """Stacked experts, of which recipes know nothing, are in the report with their bytes and the reason."""
    model = mixtures.build("mixtral")
    result = eckart.compress(model, "rtn", budget="0.95", data=tiny.batches()).result
    named = {layer.name: layer for layer in result.layers}
    own = dict(model.named_parameters())
    for block in range(2):
        for name in ("gate_up_proj", "down_proj"):
            layer = named[f"model.layers.{block}.mlp.experts.{name}"]
            assert layer.form == "dense()"
            assert layer.part == block
            assert layer.bytes == layer.dense_bytes == 4 * own[layer.name].numel()
            assert "no layer that a form can stand for" in str(layer.note)


class Padded(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


def test_a_layer_with_a_forward_pass_of_its_own_is_left_and_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Padded(3, 8, 2, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.Linear(256, 4))
    x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    before = model(x)
    result = eckart.compress(model, "gptq", budget="2KB", data=[{"input": x}]).result
    assert type(model[0]) is Padded
    notes = {layer.name: str(layer.note) for layer in result.layers}
    assert "Padded is no layer that a form can stand for" in notes["0.weight"]
    assert model(x).shape == before.shape


@pytest.mark.parametrize("method", ["gptq", "pvq", "svd_llm"])
def test_block_by_block_with_tables_and_heads(method: str) -> None:
    """Tables are looked up before the first block, and the head is read after the last one."""
    settings = {"targets": ".*", "one_shot": False}
    result = eckart.compress(tiny.build("llama"), method, budget=0.6, data=tiny.batches((2, 2)), **settings).result
    forms = {layer.name: layer.form for layer in result.layers}
    assert {"model.embed_tokens", "lm_head"} <= set(forms)
    assert "dense()" not in (forms["model.embed_tokens"], forms["lm_head"])
