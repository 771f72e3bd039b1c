"""Gradients at frozen weights, one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import eckart
from eckart.adapters.gradients import weight_gradients
from eckart.calibration.stream import single_rows
from eckart.forms.layers import drop_in
from eckart.testing.adapters import batches, small_model

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]


def by_hand(model: Any, data: list[dict[str, Tensor]], squared: bool = False) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(model.get_submodule(name).weight) for name in NAMES}
    for batch in data:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        for name in NAMES:
            gradient = model.get_submodule(name).weight.grad
            sums[name] += gradient.square() if squared else gradient
    model.zero_grad()
    return sums


def test_sums_are_those_of_a_plain_backward_pass() -> None:
    model, data = small_model(), batches()
    for squared in (False, True):
        expected = by_hand(model, single_rows(data) if squared else data, squared)
        found = weight_gradients(model, NAMES, data, squared)
        labelled = weight_gradients(model, NAMES, [{**b, "labels": b["input_ids"]} for b in data], squared, at_once=2)
        for name in NAMES:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-8)
            torch.testing.assert_close(labelled[name], expected[name], rtol=1e-4, atol=1e-8)


def test_one_gradient_at_a_time_is_held_and_all_is_left_as_it_was() -> None:
    model = small_model()
    model.model.norm.weight.requires_grad_(False)
    held = model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    seen: list[str] = []

    def reduce(name: str, total: Tensor) -> float:
        assert all(p.grad is None for p in model.parameters())
        seen.append(name)
        return float(total.norm())

    found = weight_gradients(model, NAMES, batches(1), reduce=reduce)
    assert seen == ["lm_head", *NAMES[1::-1]], "each is reduced when the backward pass has reached it"
    assert all(value > 0 for value in found.values())
    assert [p.requires_grad for p in model.parameters()] == before
    assert model.lm_head.weight.grad is held
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_shared_weights_layouts_and_models_without_words() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    assert weight_gradients(gpt2, ["transformer.h.0.attn.c_attn"], batches(1))["transformer.h.0.attn.c_attn"].shape == (48, 16)  # fmt: skip # noqa: E501
    linear = nn.Linear(6, 6)
    twice = nn.Sequential(nn.Conv2d(3, 6, 2), nn.Flatten(), linear, linear)
    found = weight_gradients(twice, ["0", "2", "3"], [{"input": torch.randn(4, 3, 2, 2)}])
    assert found["0"].shape == (6, 12)
    assert torch.equal(found["2"], found["3"])
    again = weight_gradients(twice, ["0"], [{"input": torch.randn(4, 3, 2, 2)}], seed=0)
    assert float(again["0"].norm()) > 0, "answers drawn from its own teach a model without labels something"


def test_bad_input_is_named() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="at least one batch"):
        weight_gradients(model, NAMES, [])
    with pytest.raises(ValueError, match=r"model\.norm is a LlamaRMSNorm"):
        weight_gradients(model, ["model.norm"], batches(1))
    model.unused = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no gradient reaches unused"):
        weight_gradients(model, [*NAMES, "unused"], batches(1))
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the gradient at .* is not finite"):
        weight_gradients(model, NAMES, batches(1))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    factored = small_model()
    factored.lm_head = drop_in(factored.lm_head, eckart.fit("low_rank(rank=4)", factored.lm_head.weight.data))
    with pytest.raises(ValueError, match="lm_head is a FactoredLinear"):
        weight_gradients(factored, NAMES, batches(1))
