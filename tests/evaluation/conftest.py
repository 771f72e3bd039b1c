from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eckart.calibration.tokens import Tokens

VOCABULARY = 50


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    """Makes tiny random Llama models, whose predictions are far from uniform."""

    def make(seed: int = 0, **settings: object) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        small = {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.4,
        }
        return LlamaForCausalLM(LlamaConfig(**(small | settings))).eval()

    return make


@pytest.fixture
def windows() -> Tokens:
    """Five windows of nine tokens; the last two end in padding."""
    ids = torch.randint(0, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(1))
    return Tokens(ids, torch.arange(9) < torch.tensor([9, 9, 9, 6, 3])[:, None])
