"""LREC against its card: what trains, what it beats, and how its loss is counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import eckart
import tiny
from eckart.compression.int2_1 import _loss, corrections, recover

TRAIN, HELD = tiny.batches((8,) * 6, length=16), tiny.batches((8,), length=16, seed=9)
SETTINGS = {"num_hidden_layers": 1}


def divergence(model: Any, original: Any) -> float:
    with torch.no_grad():
        p, q = (m(**HELD[0]).logits.log_softmax(-1) for m in (original, model))
        return float(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean())


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """The original, its 2-bit base, and base and low rank before training."""
    made = {"original": tiny.build("llama", **SETTINGS)}
    for name, rank, budget in (("base", 0, "0.22 linears"), ("start", 4, "0.49 linears")):  # all layers at 2 bits
        model = tiny.build("llama", **SETTINGS)
        made[name] = eckart.compress(
            model, "int2_1", form="quantized(bits=2, group=16)", rank=rank, budget=budget, data=TRAIN
        ).model
    return made


def test_distillation_beats_the_base_the_closed_form_and_labels_alone(models: dict[str, Any]) -> None:
    original, found = models["original"], {}
    for name, weights in (("kl", {}), ("ce only", {"kl": 0.0, "ce": 1.0})):
        model = copy.deepcopy(models["start"])
        means = recover(model, original, TRAIN, epochs=4, lr=3e-3, **weights)
        assert means[-1] < means[0]
        found[name] = divergence(model, original)
    start, base = divergence(models["start"], original), divergence(models["base"], original)
    assert found["kl"] < 0.95 * start < start < base
    assert found["kl"] < found["ce only"]


def test_only_the_low_ranks_change_and_the_same_seed_gives_the_same_bits(models: dict[str, Any]) -> None:
    runs = [copy.deepcopy(models["start"]) for _ in range(2)]
    for model in runs:
        recover(model, models["original"], TRAIN[:3], epochs=1, lr=1e-3, seed=5)
    before, states = models["start"].state_dict(), [m.state_dict() for m in runs]
    assert all(torch.equal(states[0][k], states[1][k]) for k in before)
    moved = {k for k in before if not torch.equal(states[0][k], before[k])}
    assert len(moved) == len(corrections(runs[0])) > 0
    assert all(".terms.1." in k for k in moved)
    assert not any(p.requires_grad and p.grad is not None for p in runs[0].parameters())


def test_no_epoch_leaves_the_model_as_it_is(models: dict[str, Any]) -> None:
    model = copy.deepcopy(models["start"])
    assert recover(model, models["original"], TRAIN, epochs=0) == []
    assert torch.equal(model(**HELD[0]).logits, models["start"](**HELD[0]).logits)


def test_the_divergence_counts_per_token(models: dict[str, Any]) -> None:
    """A window twice over weighs as much as once, and padding weighs nothing."""
    batch, pair = HELD[0], (models["start"], models["original"])
    twice = {"input_ids": batch["input_ids"].repeat(2, 1)}
    padded = {
        "input_ids": F.pad(batch["input_ids"], (0, 5)),
        "attention_mask": F.pad(torch.ones_like(batch["input_ids"]), (0, 5)),
    }
    with torch.no_grad():
        once, *others = (float(_loss(*pair, b, 1.0, 0.1)) for b in (batch, twice, padded))
    assert others == pytest.approx([once, once], rel=1e-5)


def test_refusals(models: dict[str, Any]) -> None:
    model, original = models["start"], models["original"]
    with pytest.raises(ValueError, match="the model has no low rank beside another form"):
        recover(models["base"], original, TRAIN)
    with pytest.raises(ValueError, match="give at least one batch"):
        recover(model, original, [])
    with pytest.raises(ValueError, match="they need one vocabulary"):
        recover(model, tiny.build("llama", **SETTINGS, vocab_size=200), TRAIN)
    with pytest.raises(ValueError, match="load the model in float32"):
        recover(copy.deepcopy(model).bfloat16(), original, TRAIN)
    with pytest.raises(RuntimeError, match=r"the loss of batch \d+ is .*: lower lr, which is 1e\+20"):
        recover(copy.deepcopy(model), original, TRAIN, lr=1e20)
