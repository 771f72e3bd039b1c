"""A sum of a quantised and a low-rank term, taken apart into a base and a LoRA adapter that PEFT puts together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.export import export
from eckart.forms.layers import DropIn, FactoredLinear
from eckart.forms.quantized import QuantizedMatrix
from eckart.forms.splits import splits


def together(out: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype="auto")
    return PeftModel.from_pretrained(base, out / "adapter").eval()


@pytest.mark.parametrize(
    ("family", "form", "dtype"),
    [
        ("llama", "quantized(bits=3, group=16) + low_rank(rank=4)", torch.float32),
        ("llama", "quantized(bits=3, group=16) + low_rank(rank=4)", torch.float16),
        ("llama", "diagonal() + low_rank(rank=2) + quantized(bits=2) + low_rank(rank=3)", torch.float32),
        ("gpt2", "quantized(bits=4) + low_rank(rank=4)", torch.float32),
        ("qwen3", "quantized(bits=2) + quantized(bits=8) @ dense(width=3)", torch.float32),
    ],
)
def test_base_and_adapter_compute_what_the_sum_does(tmp_path: Path, family: str, form: str, dtype: torch.dtype) -> None:
    model = made.factor(tiny.build(family, dtype=dtype), form, dtype=dtype)
    found = export(made.save(model, tmp_path / "m"), "peft", tmp_path / "out")
    apart = together(tmp_path / "out")
    ids = made.ids()
    wanted = made.logits(model, ids)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(made.logits(apart, ids), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))
    with apart.disable_adapter():
        assert (made.logits(apart, ids) - wanted).abs().max() > 1e-2, "the adapter carries nothing"
    assert all("with a LoRA of rank" in text for text in found.layers.values())
    assert set(found.files) >= {"base/model.safetensors", "base/tokenizer.json", "adapter/adapter_model.safetensors"}


def test_the_base_holds_the_quantised_term_only(tmp_path: Path) -> None:
    model = made.factor(tiny.build("llama"), "quantized(bits=3, group=16) + low_rank(rank=4)")
    export(made.save(model, tmp_path / "m"), "peft", tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base", dtype="auto")
    factored = [m for m in base.modules() if isinstance(m, DropIn)]
    assert len(factored) == 21
    assert all(isinstance(m.matrix, QuantizedMatrix) for m in factored)
    name = "model.layers.1.mlp.up_proj"
    saved = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    term: Any = model.get_submodule(name).matrix.terms[1]
    assert torch.equal(saved[f"base_model.model.{name}.lora_B.weight"], term.left.weight)
    assert torch.equal(saved[f"base_model.model.{name}.lora_A.weight"], term.right.weight)


def test_every_layer_keeps_its_own_rank(tmp_path: Path) -> None:
    model = tiny.build("llama")
    made.factor(model, "quantized(bits=3) + low_rank(rank=6)", ("layers.1.self_attn.q_proj", "v_proj"))
    made.factor(model, "quantized(bits=3) + low_rank(rank=2)", ("up_proj", "down_proj"))
    made.factor(model, "low_rank(rank=5)", ("gate_proj",))
    found = export(made.save(model, tmp_path / "m"), "peft", tmp_path / "out")
    config = tiny.read_json(tmp_path / "out/adapter/adapter_config.json")
    assert config["r"] == config["lora_alpha"] == 2
    assert config["rank_pattern"]["model.layers.1.self_attn.q_proj"] == 6
    assert config["rank_pattern"] == config["alpha_pattern"]
    apart, ids = together(tmp_path / "out"), made.ids()
    torch.testing.assert_close(made.logits(apart, ids), made.logits(model, ids), rtol=0, atol=1e-5)
    assert found.layers["model.layers.0.mlp.gate_proj"].startswith("whole in the base: low_rank(rank=5)")


def test_layers_that_share_a_matrix_are_not_taken_apart() -> None:
    matrix = eckart.fit("quantized(bits=4) + low_rank(rank=2)", torch.randn(8, 8))
    model = nn.ModuleDict({"a": FactoredLinear(matrix), "b": FactoredLinear(matrix)})
    found, whole = splits(model)
    assert not found
    assert whole == dict.fromkeys("ab", "it shares its matrix with another layer")


def test_embeddings_stay_in_the_base(tmp_path: Path) -> None:
    model = tiny.build("llama")
    made.factor(model, "quantized(bits=4) + low_rank(rank=4)", ("embed_tokens", "q_proj"))
    found = export(made.save(model, tmp_path / "m"), "peft", tmp_path / "out")
    assert "kind embedding" in found.layers["model.embed_tokens"]
    ids = made.ids()
    torch.testing.assert_close(made.logits(together(tmp_path / "out"), ids), made.logits(model, ids), rtol=0, atol=1e-5)


def test_a_model_without_low_rank_terms_is_refused(tmp_path: Path) -> None:
    folder = made.save(made.factor(tiny.build("llama"), "quantized(bits=4)"), tmp_path / "m")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj stays whole.*Compress with a form"):
        export(folder, "peft", tmp_path / "out")
    plain = made.save(tiny.build("llama"), tmp_path / "plain")
    with pytest.raises(ValueError, match="nothing is factored"):
        export(plain, "peft", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "plain"], "a refused export left something behind"


def test_thin_factors_that_round_their_inputs_stay_in_the_base() -> None:
    rounding = "quantized_inputs(matrix=dense())"
    form = f"quantized(bits=4) + low_rank(rank=2) + low_rank(rank=3, factors={rounding})"
    model = made.factor(tiny.build("llama"), form, ("up_proj",))
    found, _ = splits(model)
    assert {parts.rank for parts in found.values()} == {2}
    layer = next(iter(found))
    whole, parts = model.get_submodule(layer).matrix, found[layer]
    x = torch.randn(4, whole.shape[1])
    assert torch.allclose(parts.rest(x) + x @ parts.right.T @ parts.left.T, whole(x), atol=1e-5)
