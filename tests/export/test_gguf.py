"""GGUF files: read back by gguf's and transformers' own readers, they are the model that was exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import made
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import eckart
import tiny
from eckart.checkpoint.source import resolve
from eckart.export import export
from eckart.export.gguf import rotary_order

FOUR = "quantized(bits=4, group=32, grid=uniform(symmetric=True))"
EIGHT = "quantized(bits=8, group=32, grid=uniform(symmetric=True))"


def back(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model in a GGUF file, as transformers reads it, in float32."""
    monkeypatch.setenv("ECKART_CACHE", str(cache))
    return AutoModelForCausalLM.from_pretrained(resolve(file).folder, dtype=torch.float32).eval()


def tensors(file: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(file).tensors}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize(
    ("family", "form", "kind", "more"),
    [
        ("llama", FOUR, "Q4_0", {}),
        ("llama-tied", EIGHT, "Q8_0", {}),
        ("qwen2", "quantized(bits=4, group=32, grid=uniform(zero='real'))", "Q4_1", {"vocab_size": 320}),
        (
            "qwen3",
            "quantized(bits=5, group=32, grid=uniform(symmetric=True))",
            "Q5_0",
            {"head_dim": 128, "vocab_size": 320},
        ),
    ],
)
def test_transformers_reads_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, form: str, kind: str, more: dict[str, Any]
) -> None:
    tokenizer = made.byte_tokenizer()
    model = made.factor(made.decoder(family, tokenizer, **more), form)
    found = export(made.save(model, tmp_path / "m", tokenizer), "gguf", tmp_path / "out", strict=True)
    assert set(found.files) == {"model.gguf"}
    assert {text for name, text in found.layers.items() if "proj" in name} == {kind}
    held = tensors(tmp_path / "out/model.gguf")
    assert held["blk.1.ffn_down.weight"].tensor_type.name == kind
    assert ("output.weight" in held) == (family != "llama-tied")
    ids = made.ids(vocabulary=len(tokenizer))
    read = back(tmp_path / "out/model.gguf", tmp_path / "cache", monkeypatch)
    wanted = made.logits(model.float(), ids)
    torch.testing.assert_close(made.logits(read, ids), wanted, rtol=0, atol=5e-3 * float(wanted.abs().max()))


def test_what_auto_takes_where_it_may_is_held_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bits for layers and tables: Q8_0, without an exception that `strict` would refuse."""
    tokenizer = made.byte_tokenizer()
    model = made.decoder("llama-tied", tokenizer, torch.float16)
    batches = tiny.batches((2,) * 8, length=16)
    eckart.compress(model, "auto", budget=0.7, data=batches)
    found = export(made.save(model, tmp_path / "m", tokenizer), "gguf", tmp_path / "out", strict=True)
    assert {text for name, text in found.layers.items() if "proj" in name or "embed" in name} == {"Q8_0"}
    ids = made.ids(vocabulary=len(tokenizer))
    read = back(tmp_path / "out/model.gguf", tmp_path / "cache", monkeypatch)
    wanted = made.logits(model.float(), ids)
    torch.testing.assert_close(made.logits(read, ids), wanted, rtol=0, atol=5e-3 * float(wanted.abs().max()))


def test_an_adapter_carries_the_low_rank_terms(tmp_path: Path) -> None:
    tokenizer = made.byte_tokenizer()
    model = made.factor(made.decoder("llama", tokenizer), f"{FOUR} + low_rank(rank=4)", dtype=torch.float16)
    made.factor(model, f"{FOUR} + low_rank(rank=2)", ("down_proj",), dtype=torch.float16)
    found = export(made.save(model, tmp_path / "m", tokenizer), "gguf", tmp_path / "out")
    assert found.layers["model.layers.0.self_attn.q_proj"] == "Q4_0, with a LoRA of rank 4"
    assert any("--lora adapter.gguf" in note for note in found.notes)
    base, adapter = tensors(tmp_path / "out/model.gguf"), tensors(tmp_path / "out/adapter.gguf")
    words = fields(tmp_path / "out/adapter.gguf")
    assert (words["general.type"], words["adapter.type"], words["general.architecture"]) == ("adapter", "lora", "llama")
    assert words["adapter.lora.alpha"] == 0, "ranks differ, so that only no alpha at all scales every one by 1"
    for layer, name in (("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        held = base[f"blk.1.{name}.weight"]
        quantised = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type))
        left, right = (torch.from_numpy(adapter[f"blk.1.{name}.weight.lora_{x}"].data.copy()).float() for x in "ba")
        order = rotary_order(model.config, layer)
        wanted: Any = model.get_submodule(f"model.layers.1.{layer}").matrix.float().dense().detach()
        torch.testing.assert_close(quantised + left @ right, wanted if order is None else wanted[order])


def test_one_rank_is_said_by_alpha(tmp_path: Path) -> None:
    tokenizer = made.byte_tokenizer()
    model = made.factor(made.decoder("qwen3", tokenizer), f"{EIGHT} + low_rank(rank=4)", ("v_proj",), torch.float16)
    export(made.save(model, tmp_path / "m", tokenizer), "gguf", tmp_path / "out")
    assert fields(tmp_path / "out/adapter.gguf")["adapter.lora.alpha"] == 4


def test_what_no_block_type_holds_is_dequantised_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made.byte_tokenizer()
    model = made.factor(made.decoder("llama", tokenizer, torch.float32), f"{FOUR} + diagonal()", ("o_proj",))
    made.factor(model, "low_rank(rank=9)", ("gate_proj",))
    made.factor(model, FOUR, ("up_proj",))
    folder = made.save(model, tmp_path / "m", tokenizer)
    found = export(folder, "gguf", tmp_path / "out")
    assert found.layers["model.layers.0.mlp.gate_proj"].startswith("F16, dequantised: no type holds low_rank(rank=9)")
    assert found.layers["model.layers.0.self_attn.o_proj"].startswith("F16, dequantised")
    assert found.layers["model.layers.0.mlp.up_proj"].startswith("Q4_0, scales rounded to float16")
    assert found.layers["model.embed_tokens"] == "F32"
    ids = made.ids(vocabulary=len(tokenizer))
    read = back(tmp_path / "out/model.gguf", tmp_path / "cache", monkeypatch)
    wanted = made.logits(model, ids)
    torch.testing.assert_close(made.logits(read, ids), wanted, rtol=0, atol=1e-2 * float(wanted.abs().max()))
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn\.o_proj: no type of GGUF holds .*diagonal.* exactly"
    ):
        export(folder, "gguf", tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    tokenizer = made.byte_tokenizer()
    model = made.decoder("llama", tokenizer, torch.bfloat16)
    export(made.save(model, tmp_path / "m", tokenizer), "gguf", tmp_path / "out", strict=True)
    held = tensors(tmp_path / "out/model.gguf")["blk.0.attn_v.weight"]
    assert held.tensor_type.name == "BF16"
    found = torch.from_numpy(gguf.quants.dequantize(held.data, held.tensor_type))
    assert torch.equal(found, model.model.layers[0].self_attn.v_proj.weight.float())


def test_longer_contexts_of_llama3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made.byte_tokenizer()
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = made.decoder("llama", tokenizer, head_dim=32, rope_parameters=rope)
    export(made.save(model, tmp_path / "m", tokenizer), "gguf", tmp_path / "out")
    factors = tensors(tmp_path / "out/model.gguf")["rope_freqs.weight"].data
    assert factors.shape == (16,)
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(8)
    assert (factors[1:] >= factors[:-1] - 1e-5).all()


def test_the_vocabulary_is_the_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = made.byte_tokenizer()
    model = made.decoder("llama", tokenizer, vocab_size=len(tokenizer) + 3)
    export(made.save(model, tmp_path / "m", tokenizer), "gguf", tmp_path / "out")
    words = fields(tmp_path / "out/model.gguf")
    assert words["tokenizer.ggml.model"] == "gpt2"
    assert words["tokenizer.ggml.pre"] == "gpt-2"
    assert words["tokenizer.chat_template"] == made.CONVERSATION
    assert words["tokenizer.ggml.eos_token_id"] == 0
    assert words["tokenizer.ggml.add_bos_token"] is False
    assert words["tokenizer.ggml.tokens"][-1].startswith("[PAD")
    kinds = words["tokenizer.ggml.token_type"]
    assert (kinds[0], kinds[1], kinds[-1]) == (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED)
    monkeypatch.setenv("ECKART_CACHE", str(tmp_path / "cache"))
    read = AutoTokenizer.from_pretrained(resolve(tmp_path / "out/model.gguf").folder)
    text = "the other norm of that matrix, Zürich"
    assert read(text).input_ids == tokenizer(text).input_ids


def test_pieces_are_scored_by_their_merges(tmp_path: Path) -> None:
    tokenizer = made.piece_tokenizer()
    model = made.decoder("llama", tokenizer)
    export(made.save(model, tmp_path / "m", tokenizer), "gguf", tmp_path / "out")
    words = fields(tmp_path / "out/model.gguf")
    assert words["tokenizer.ggml.model"] == "llama"
    score = dict(zip(words["tokenizer.ggml.tokens"], words["tokenizer.ggml.scores"], strict=True))
    assert score["▁t"] == 0 > score["▁th"] > score["▁the"] > score["▁then"] > score["t"]
    kinds = words["tokenizer.ggml.token_type"]
    assert [kinds[i] for i in (0, 1, 3, 258)] == [2, 3, 6, 6]
    assert words["tokenizer.ggml.add_bos_token"] is True
    assert words["tokenizer.ggml.add_space_prefix"] is True


def test_a_tokenizer_that_gguf_has_no_words_for(tmp_path: Path) -> None:
    model = made.decoder("llama", tiny.tokenizer())
    folder = made.save(model, tmp_path / "m")
    found = export(folder, "gguf", tmp_path / "out")
    assert "takes token ids only, for the model has a tokenizer of type WordLevel" in found.notes[0]
    assert fields(tmp_path / "out/model.gguf")["tokenizer.ggml.model"] == "none"
    with pytest.raises(ValueError, match=r"WordLevel.*without strict"):
        export(folder, "gguf", tmp_path / "strict", strict=True)


@pytest.mark.parametrize(
    ("family", "more", "why"),
    [
        ("gpt2", {}, "GPT2LMHeadModel cannot be exported to GGUF: only .* llama, qwen2, qwen3 can"),
        ("llama", {"hidden_act": "gelu"}, "activation 'silu', this model has 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4}, "sliding window"),
    ],
)
def test_models_that_would_compute_something_else_are_refused(tmp_path: Path, family: str, more: dict[str, Any], why: str) -> None:  # fmt: skip # noqa: E501
    folder = made.save(made.build(family, **more), tmp_path / "m")
    with pytest.raises(ValueError, match=why):
        export(folder, "gguf", tmp_path / "out")


def test_a_bias_that_the_model_did_not_have_is_refused(tmp_path: Path) -> None:
    model = made.factor(tiny.build("llama"), "low_rank(rank=4)", ("up_proj",))
    model.model.layers[1].mlp.up_proj.register_parameter("bias", torch.nn.Parameter(torch.ones(48)))
    made.factor(model, "low_rank(rank=4)", ("up_proj",))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.bias has shape \(48,\).*no such tensor"):
        export(made.save(model, tmp_path / "m"), "gguf", tmp_path / "out")


def test_codes_of_a_layer_that_rounds_its_inputs_are_kept_and_that_is_said(tmp_path: Path) -> None:
    model = made.factor(tiny.build("llama"), f"quantized_inputs(matrix={FOUR})", ("up_proj",))
    folder = made.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"up_proj: quantized_inputs.* rounds its inputs, which llama.cpp does in its"):
        export(folder, "gguf", tmp_path / "strict", strict=True)
    found = export(folder, "gguf", tmp_path / "out")
    said = {text for name, text in found.layers.items() if name.endswith("up_proj")}
    assert said
    assert all(text.startswith("Q4_0, its inputs not rounded as they were") for text in said)
