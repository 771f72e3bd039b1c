"""Perplexity is that of the obvious loop, whatever the batch, the chunk, the padding and the architecture."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from eckart.calibration.tokens import Tokens
from eckart.evaluation import logits as logits_module
from eckart.evaluation.logits import next_token_logits, predicted, rows_per_chunk, targets, vocabulary_size
from eckart.evaluation.perplexity import Perplexity, perplexity

Make = Callable[..., transformers.LlamaForCausalLM]
SMALL = {"vocab_size": 50, "hidden_size": 16, "max_position_embeddings": 64}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def naive_losses(model: transformers.PreTrainedModel, tokens: Tokens) -> list[list[float]]:
    """Loss of each predicted token: its whole prefix through the model by itself, in float64."""
    model = copy.deepcopy(model).double()
    losses: list[list[float]] = []
    for row, real in zip(tokens.ids, tokens.mask, strict=True):
        text = row[real]
        losses.append([])
        for t in range(1, len(text)):
            with torch.no_grad():
                logits = model(text[None, :t]).logits[0, -1]
            losses[-1].append(float(torch.logsumexp(logits, 0) - logits[text[t]]))
    return losses


def family(name: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    configs: dict[str, Any] = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, **special
        ),
        "opt": lambda: transformers.OPTConfig(
            **SMALL, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=8, **special
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL, **LAYERS, **special),
        "gemma2": lambda: transformers.Gemma2Config(
            **SMALL, **LAYERS, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, **special
        ),
        "cohere": lambda: transformers.CohereConfig(
            **SMALL, **LAYERS, num_key_value_heads=1, logit_scale=3.0, **special
        ),
        "granite": lambda: transformers.GraniteConfig(
            **SMALL, **LAYERS, num_key_value_heads=1, logits_scaling=7.0, **special
        ),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[name]()).eval()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_it_is_what_the_obvious_loop_says(llama: Make, windows: Tokens, batch_size: int) -> None:
    model = llama()
    losses = naive_losses(model, windows)
    flat = [loss for window in losses for loss in window]
    found = perplexity(model, windows, batch_size)
    assert found.tokens == len(flat) == 31
    assert found.nll == pytest.approx(sum(flat) / 31, rel=1e-6)
    assert found.value == pytest.approx(math.exp(sum(flat) / 31), rel=1e-5)
    assert found.value > 2 * 50  # the model is sure of the wrong things: a uniform guess would not pass


def test_the_standard_error_is_that_of_window_means(llama: Make) -> None:
    ids = torch.randint(0, 50, (20, 9), generator=torch.Generator().manual_seed(2))
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    model = llama()
    found = perplexity(model, tokens)
    means = torch.tensor([sum(window) / 8 for window in naive_losses(model, tokens)], dtype=torch.float64)
    assert found.stderr == pytest.approx(found.value * float(means.std()) / math.sqrt(20), rel=1e-4)
    assert perplexity(model, tokens[:1]).stderr is None


def test_padding_counts_for_nothing(llama: Make, windows: Tokens) -> None:
    model = llama()
    other = Tokens(torch.where(windows.mask, windows.ids, 7), windows.mask)
    assert not torch.equal(other.ids, windows.ids)
    assert perplexity(model, other) == perplexity(model, windows)
    longer = Tokens(*(torch.nn.functional.pad(t, (0, 20)) for t in (windows.ids, windows.mask)))
    assert perplexity(model, longer).tokens == 31
    assert perplexity(model, longer).nll == pytest.approx(perplexity(model, windows).nll, rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "gemma2", "cohere", "granite"])
def test_chunks_of_every_family_are_its_own_logits(name: str, windows: Tokens) -> None:
    model = family(name)
    with torch.no_grad():
        whole = model(**windows.inputs()).logits[:, :-1][predicted(windows.mask)]
    assert vocabulary_size(model) == 50
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *args: seen.append(args[2].numel() // 50))
    chunks = list(next_token_logits(model, windows, rows=7))
    hook.remove()
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 7, 3]
    assert seen == [7, 7, 7, 7, 3]
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=1e-5, atol=1e-6)
    assert "forward" not in model.get_decoder().__dict__


def test_a_model_whose_body_is_not_found_gives_all_at_once(llama: Make, windows: Tokens) -> None:
    model = llama()
    elsewhere = copy.deepcopy(model.model)
    model.get_decoder = lambda: elsewhere
    chunks = list(next_token_logits(model, windows, rows=7))
    assert [len(chunk) for chunk in chunks] == [7, 7, 7, 7, 3]
    expected = torch.cat(list(next_token_logits(llama(), windows, rows=100)))
    torch.testing.assert_close(torch.cat(chunks), expected, rtol=1e-5, atol=1e-6)


def test_an_own_forward_of_the_body_is_put_back(llama: Make, windows: Tokens) -> None:
    model = llama()
    own = model.model.forward
    model.model.forward = own  # as hooks of accelerate do
    list(next_token_logits(model, windows, rows=7))
    assert model.model.__dict__["forward"] is own


def test_chunks_are_small(monkeypatch: pytest.MonkeyPatch, llama: Make, windows: Tokens) -> None:
    whole = perplexity(llama(), windows)
    monkeypatch.setattr(logits_module, "CHUNK", 150)
    assert rows_per_chunk(50) == 3
    assert rows_per_chunk(1000) == 1
    assert perplexity(llama(), windows).nll == pytest.approx(whole.nll, rel=1e-6)


def test_targets_are_the_tokens_after_text(windows: Tokens) -> None:
    assert targets(windows).tolist()[:8] == windows.ids[0, 1:].tolist()
    assert targets(windows).tolist()[-2:] == windows.ids[4, 1:3].tolist()
    assert len(targets(windows)) == 31


def test_the_mode_is_left_as_it_was_and_dropout_is_off(llama: Make, windows: Tokens) -> None:
    model = llama(attention_dropout=0.9).train()
    model.lm_head.eval()
    assert perplexity(model, windows) == perplexity(llama(), windows)
    assert model.training
    assert model.model.layers[0].training
    assert not model.lm_head.training


def test_half_precision_is_summed_in_full(llama: Make, windows: Tokens) -> None:
    model = llama(initializer_range=0.2)
    exact = perplexity(model, windows)
    assert perplexity(model.to(torch.bfloat16), windows).nll == pytest.approx(exact.nll, rel=0.05)


def test_progress(llama: Make, windows: Tokens) -> None:
    steps: list[tuple[str, int, int]] = []
    perplexity(llama(), windows, 2, progress=lambda *step: steps.append(step))
    assert steps == [("perplexity", 1, 3), ("perplexity", 2, 3), ("perplexity", 3, 3)]


def test_nothing_to_predict(llama: Make) -> None:
    one = Tokens(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[True, False, False]] * 2))
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(llama(), one)


def test_a_broken_model(llama: Make, windows: Tokens) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="window 0 are not finite"):
        perplexity(model, windows)


def test_a_model_that_is_infinitely_wrong() -> None:
    found = Perplexity.of_windows(torch.tensor([8000.0, 8000.0], dtype=torch.float64), torch.tensor([8, 8]))
    assert (found.nll, found.value) == (1000.0, math.inf)
