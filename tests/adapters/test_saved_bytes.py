"""What adapters keep for the backward pass, beside PEFT's LoRA of the same rank, on one layer.

Counted are tensors that autograd saves in a forward pass, each storage once, without weights and buffers of the model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, RandLoraConfig, get_peft_model
from torch import nn

from eckart import adapters
from eckart.runs.counting import SavedBytes

WIDTH, TOKENS, RANK = 256, 64, 8
INPUT, HIDDEN, FACTOR = 4 * TOKENS * WIDTH, 4 * TOKENS * RANK, 4 * RANK * WIDTH
LORA = INPUT + HIDDEN


def kept(make: Any) -> int:
    """Bytes that one layer with an adapter saves for backward."""
    torch.manual_seed(0)
    model = make(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    with SavedBytes(model) as saved:
        y = model(x)
    y.sum().backward()
    assert any(p.grad is not None for p in model.parameters())
    return saved.total


def ours(key: str, **settings: Any) -> Any:
    return lambda model: adapters.adapt(model, key, target_modules=["0"], rank=RANK, **settings)


def theirs(config: Any) -> Any:
    return lambda model: get_peft_model(model, config)


def test_peft_lora_keeps_its_input_and_what_is_between_the_factors() -> None:
    assert kept(theirs(LoraConfig(r=RANK, target_modules=["0"]))) == LORA


def test_paca_keeps_the_selected_columns_of_the_input() -> None:
    assert kept(ours("paca")) == HIDDEN
    assert LORA == 33 * HIDDEN


@pytest.mark.parametrize("key", ["snell", "snella", "lift"])
def test_dense_updates_keep_the_input_and_no_matrix(key: str) -> None:
    assert kept(ours(key)) == INPUT < LORA


def test_nola_keeps_two_factors_of_a_lora_and_no_basis() -> None:
    for bases in (32, 512):
        assert kept(ours("nola", bases=bases)) == LORA + 2 * FACTOR


def test_randlora_keeps_a_matrix_of_the_size_of_the_layer_and_so_saves_nothing() -> None:
    found = kept(theirs(RandLoraConfig(r=RANK, target_modules=["0"])))
    assert found == kept(ours("randlora"))  # which is PEFT's
    assert found == 4 * WIDTH * WIDTH + 4 * TOKENS * WIDTH > 4 * LORA  # the scaled bases, and what they are applied to
