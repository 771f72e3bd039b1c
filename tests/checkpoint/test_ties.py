"""A compressed token table, and the head that is tied to it: one matrix, stored once, in memory and on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.checkpoint.ties import shared, sharers
from eckart.forms.layers import FactoredEmbedding, FactoredLinear

TARGETS = r"model\.embed_tokens|model\.layers.*proj"
FORMS = pytest.mark.parametrize("form", ["quantized(bits=8)", "low_rank(rank=8)"])


def check(model: Any) -> None:
    assert isinstance(model.model.embed_tokens, FactoredEmbedding)
    assert isinstance(model.lm_head, FactoredLinear)
    assert model.lm_head.matrix is model.model.embed_tokens.matrix
    assert shared(model) == {"lm_head": "model.embed_tokens"}


@FORMS
def test_saved_loaded_saved(form: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "m", "llama-tied")
    result = eckart.compress_to(tmp_path / "a", tmp_path / "m", form=form, metric="plain()", budget=0.99, targets=TARGETS)  # fmt: skip # noqa: E501
    assert result.bytes_after == tiny.weight_bytes(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    check(loaded)
    loaded.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    check(again)
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, again(ids).logits)
    rows = loaded.model.embed_tokens.weight[ids[0]]
    assert torch.equal(loaded.model.embed_tokens(ids[0]), rows.as_subclass(torch.Tensor))


@FORMS
def test_in_memory(form: str, tmp_path: Path) -> None:
    model = tiny.build("llama-tied")
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    done = eckart.compress(model, form=form, metric="plain()", budget=0.99, targets=TARGETS)
    check(done.model)
    held = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()})
    assert held < before
    check(copy.deepcopy(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    check(loaded)
    ids = torch.arange(9)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    dense = eckart.densify(loaded)
    assert torch.allclose(dense(ids).logits, model(ids).logits, atol=1e-5)


def test_a_head_with_no_place_for_a_mean_keeps_the_table_dense() -> None:
    model = tiny.build("llama-tied")
    assert sharers(model, "model.embed_tokens") == ["lm_head"]
    done = eckart.compress(model, "lord", budget=0.95, data=tiny.batches(), targets=TARGETS)
    note = next(layer.note for layer in done.result.layers if layer.name == "model.embed_tokens")
    assert note == "left dense: a head shares it, which has no place for the mean of its rows"
    assert shared(model) == {}
