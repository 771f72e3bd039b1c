"""Rounding to nearest, the baseline of all quantisers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantised import check_method

import eckart
import tiny
from eckart.allocation import BudgetError
from eckart.forms import parse


def test_through_a_model(tmp_path: Path) -> None:
    result = check_method("rtn", tmp_path)
    forms = {layer.form for layer in result.layers}
    assert forms <= {f"quantized(bits={b})" for b in (2, 3, 4, 5, 6, 8)}


def test_needs_no_data() -> None:
    model, result = eckart.compress(tiny.build("llama"), "rtn", budget="1.0", form="quantized(bits=3, group=16)")
    assert {layer.form for layer in result.layers} == {"quantized(bits=3, group=16)"}
    layer = model.model.layers[0].self_attn.q_proj
    wanted = parse("quantized(bits=3, group=16)").fit(tiny.build("llama").model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(layer.matrix.dense(), wanted.dense())


def test_embeddings_too(tmp_path: Path) -> None:
    model, _ = eckart.compress(
        tiny.build("llama-tied"), "rtn", budget="1.0", form="quantized(bits=6, group=8)", targets=r"model\.embed_tokens"
    )
    ids = tiny.batches()[0]["input_ids"]
    logits = model(input_ids=ids).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(input_ids=ids).logits, logits, atol=1e-5)
    original = tiny.build("llama-tied").model.embed_tokens.weight.detach()
    rows = loaded.model.embed_tokens(ids).detach()
    assert 0 < float((rows - original[ids]).abs().max()) < 0.05


def test_an_impossible_budget_is_refused() -> None:
    with pytest.raises(BudgetError, match="smallest possible"):
        eckart.compress(tiny.build("llama"), "rtn", budget="0.2bpw")
