"""Soft prompts that are learned through a compressed model, and put on others."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import eckart
from eckart import adapters
from eckart.adapters.compress_then_prompt import held_out_loss, learn_prompt, moved, prompt_of, word_loss
from eckart.testing.adapters import batches, near, small_model

KEY = "compress_then_prompt"
WORDS, LENGTH = 12, 12


def language(rows: int, seed: int) -> Tensor:
    """Sentences in which the two words before foretell a word, four times out of five."""
    table = torch.randint(0, WORDS, (WORDS, WORDS), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + seed)
    told = list(torch.randint(0, WORDS, (2, rows), generator=generator))
    for _ in range(LENGTH - 2):
        free = torch.randint(0, WORDS, (rows,), generator=generator)
        told.append(torch.where(torch.rand(rows, generator=generator) < 0.2, free, table[told[-2], told[-1]]))
    return torch.stack(told, 1)


def text(seed: int, rows: int = 64) -> list[dict[str, Tensor]]:
    """Batches in which the first word, that nothing but a prompt can foretell, does not count."""
    first = torch.tensor([0])
    return [{"input_ids": ids, "labels": ids.index_fill(1, first, -100)} for ids in language(rows, seed).split(32)]


@cache
def dense() -> Any:
    """A model of the language."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    steps = 180
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(steps):
        optimizer.zero_grad()
        model(**text(1000 + step, 32)[0]).loss.backward()
        optimizer.step()
        rate.step()
    return model.eval()


@cache
def compressed(method: str, budget: float) -> Any:
    return eckart.compress(copy.deepcopy(dense()), method, budget=budget).model


def learned(through: Any, steps: int = 100) -> Any:
    model = adapters.adapt(copy.deepcopy(through), KEY, tokens=6)
    learn_prompt(model, text(5, 256), text(6, 64), steps=steps, learning_rate=0.1, warmup=5, every=50)
    return model


def judged(model: Any) -> float:
    return held_out_loss(model, text(7, 96))


def test_it_is_peft_s_own_prompt_started_from_the_first_words() -> None:
    base = small_model()
    model = adapters.adapt(base, KEY, tokens=5)
    config = model.peft_config["default"]
    assert type(config) is PromptTuningConfig
    assert torch.equal(prompt_of(model, "default"), small_model().get_input_embeddings().weight[:5])
    assert [p.numel() for p in model.parameters() if p.requires_grad] == [5 * 16]
    theirs = get_peft_model(small_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    prompt_of(theirs, "default").data.copy_(prompt_of(model, "default"))
    assert torch.equal(model(**batches(1)[0]).logits, theirs(**batches(1)[0]).logits)
    uniform = [adapters.adapt(small_model(), KEY, tokens=20, start_from="uniform", seed=s) for s in (1, 1, 2)]
    first, same, other = (prompt_of(m, "default").detach() for m in uniform)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert 0.45 < float(first.abs().max()) <= 0.5
    half = adapters.adapt(small_model(torch.bfloat16), KEY, tokens=5)
    assert prompt_of(half, "default").dtype == torch.float32


def test_the_loss_is_that_of_the_text_after_the_prompt() -> None:
    model, ids = adapters.adapt(small_model(), KEY, tokens=5, start_from="uniform").eval(), batches(1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits
    assert logits.shape[1] == 5 + ids.shape[1]
    kept = mask.bool()
    expected = nn.functional.cross_entropy(logits[:, 4:-1][kept], ids[kept])
    torch.testing.assert_close(word_loss(model, {"input_ids": ids, "attention_mask": mask}), expected, rtol=0, atol=1e-6)  # fmt: skip # noqa: E501
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, small_model()(input_ids=ids).logits)


def test_cached_keys_of_the_prompt_answer_as_the_prompt_does() -> None:
    model, ids = adapters.adapt(small_model(), KEY, tokens=5, start_from="uniform").eval(), batches(1)[0]["input_ids"]
    base, prompt = model.get_base_model(), prompt_of(model, "default")
    with torch.no_grad():
        cache_of = base(inputs_embeds=prompt[None].expand(len(ids), -1, -1), use_cache=True).past_key_values
        found = base(input_ids=ids, past_key_values=cache_of).logits
        assert near(found, model(input_ids=ids).logits[:, 5:])


def test_a_learned_prompt_wins_back_loss_and_one_learned_elsewhere_does_not_win_more(tmp_path: Path) -> None:
    damaged, other = compressed("svd", 0.35), compressed("magnitude", 0.3)
    before = {n: p.clone() for n, p in damaged.state_dict().items()}
    model = learned(damaged)
    own = model.get_base_model().state_dict()
    assert all(torch.equal(own[n], before[n]) for n in before), "no weight is touched"
    plain, untrained = judged(damaged), judged(adapters.adapt(copy.deepcopy(damaged), KEY, tokens=6))
    assert judged(dense()) < judged(model) < plain < untrained

    model.save_pretrained(tmp_path / "own")
    saved = load_file(tmp_path / "own" / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == 6 * 32
    again = PeftModel.from_pretrained(copy.deepcopy(damaged), tmp_path / "own")
    assert judged(again) == judged(model)
    elsewhere = moved(tmp_path / "own", copy.deepcopy(other))
    assert torch.equal(prompt_of(elsewhere, "default"), prompt_of(model, "default"))
    learned(dense()).save_pretrained(tmp_path / "dense")
    learned(other).save_pretrained(tmp_path / "other")
    on_damaged = {name: judged(moved(tmp_path / name, copy.deepcopy(damaged))) for name in ("own", "dense", "other")}
    on_other = {name: judged(moved(tmp_path / name, copy.deepcopy(other))) for name in ("own", "dense", "other")}
    assert min(on_damaged, key=lambda n: on_damaged[n]) == "own"
    assert min(on_other, key=lambda n: on_other[n]) == "other"


def test_the_best_prompt_on_held_out_text_is_kept() -> None:
    model = adapters.adapt(small_model(), KEY, tokens=3)
    told = learn_prompt(model, batches(2), batches(2, seed=8), steps=6, every=2, learning_rate=0.5, warmup=0)
    assert len(told) == 3
    assert held_out_loss(model, batches(2, seed=8)) == pytest.approx(min(told))
    assert model.training
    again = adapters.adapt(small_model(), KEY, tokens=3)
    learn_prompt(again, batches(2), batches(2, seed=8), steps=6, every=2, learning_rate=0.5, warmup=0)
    assert torch.equal(prompt_of(model, "default"), prompt_of(again, "default"))
    assert len(learn_prompt(model, batches(2), steps=3, every=2)) == 2


class InTwo(nn.Module):
    """An embedding of two factors, of which the first has as many rows as there are words."""

    def __init__(self, words: int, width: int):
        super().__init__()
        self.left, self.right = nn.Embedding(words, 4), nn.Linear(4, width, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.right(self.left(ids))
        return found


def test_words_are_read_where_the_model_does_also_if_that_is_factored(tmp_path: Path) -> None:
    def factored() -> Any:
        model = small_model()
        model.set_input_embeddings(InTwo(32, 16))
        return model.eval()

    base, ids = factored(), batches(1)[0]["input_ids"]
    model = adapters.adapt(base, KEY, tokens=3).eval()
    with torch.no_grad():
        words = base.get_input_embeddings()
        expected = base(inputs_embeds=torch.cat([words(torch.arange(3)).expand(2, -1, -1), words(ids)], 1)).logits
        assert near(model(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path)
    other = factored()
    other.load_state_dict(base.state_dict())
    assert near(moved(tmp_path, other).eval()(input_ids=ids).logits, expected)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model, data = adapters.adapt(small_model(), KEY, tokens=25), batches(1)
    with pytest.raises(ValueError, match="9 tokens of text after 25 of the prompt are more than the model's 32 positions: cut the text to 7"):  # fmt: skip # noqa: E501
        learn_prompt(model, data)
    left = {**batches(1)[0], "attention_mask": torch.tensor([[0] + [1] * 8, [1] * 9])}
    with pytest.raises(ValueError, match="padded on the left"):
        learn_prompt(model, [left])
    for settings, words in (
        ({"tokens": 0}, r"tokens=0\)"),
        ({"tokens": 32}, "has 32 positions"),
        ({"start_from": "text"}, "start_from='text'"),
        ({"target_modules": ["q_proj"]}, "target_modules="),
        ({"dropout": 0.1}, "dropout="),
    ):
        with pytest.raises(ValueError, match=words):
            adapters.adapt(small_model(), KEY, **settings)
    with pytest.raises(ValueError, match="learn_prompt needs data"):
        learn_prompt(model, [])
    with pytest.raises(ValueError, match="carries no prompt"):
        learn_prompt(small_model_with_lora(), data)
    with pytest.raises(ValueError, match="has no embeddings of words"):
        adapters.adapt(nn.Linear(3, 3), KEY)
    model.save_pretrained(tmp_path / "prompt")
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)  # fmt: skip # noqa: E501
    with pytest.raises(ValueError, match="embeddings of width 16, and those of this model have 8"):
        moved(tmp_path / "prompt", transformers.LlamaForCausalLM(config))
    small_model_with_lora().save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="holds no prompt"):
        moved(tmp_path / "lora", small_model())


def small_model_with_lora() -> Any:
    return get_peft_model(small_model(), LoraConfig(r=2, target_modules=["q_proj"]))


def test_a_layer_that_passes_no_gradient_on_is_told() -> None:
    model = adapters.adapt(small_model(), KEY, tokens=3)
    model.get_base_model().model.layers[0].register_forward_hook(lambda module, entered, left: left.detach())
    with pytest.raises(RuntimeError, match="no gradient reaches the prompt"):
        learn_prompt(model, batches(1), steps=1)
