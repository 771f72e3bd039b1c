"""What tests of quantising methods share: a small problem, and a model's way through compression and storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import psd_root
from eckart.testing import gaussian

OUT, IN = 48, 64


def correlated(seed: int = 5) -> Weighting:
    """The covariance of inputs that depend on each other."""
    x = gaussian(800, IN, seed=seed, dtype=torch.float64) @ gaussian(IN, IN, seed=seed + 1, dtype=torch.float64)
    return Weighting(right=psd_root(x.T @ x / 800, 1e-9))


def heavy(seed: int = 0) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    return gaussian(OUT, IN, seed=seed) / gaussian(3, OUT, IN, seed=seed + 1).square().mean(0).sqrt()


def lost(W: Tensor, form: Any, norm: Weighting, dtype: torch.dtype = torch.float32) -> float:
    form = eckart.forms.as_form(form)
    return norm.norm2(W - form.fit(W, norm, dtype=dtype).dense().detach().to(W.dtype))


def check_method(method: str, folder: Path, budget: str = "0.75", **settings: Any) -> Any:
    """Compress a tiny model, save, load and save again: logits and bytes are the same, the budget is met."""
    model = tiny.build("llama")
    ids = tiny.batches()[0]["input_ids"]
    dense = model(input_ids=ids).logits.detach()
    changed, result = eckart.compress(model, method, budget=budget, data=tiny.batches((2, 2, 2, 2)), **settings)
    assert result.bytes_after <= result.budget
    assert any(layer.form != "dense()" for layer in result.layers)
    logits = changed(input_ids=ids).logits.detach()
    assert 0 < float((logits - dense).abs().max()) < float(dense.abs().max())
    changed.save_pretrained(folder / "one")
    assert tiny.weight_bytes(folder / "one") <= result.budget
    loaded = AutoModelForCausalLM.from_pretrained(folder / "one").eval()
    assert torch.allclose(loaded(input_ids=ids).logits, logits, atol=1e-5)
    loaded.save_pretrained(folder / "two")
    for name in ("model.safetensors", "config.json"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    return result
