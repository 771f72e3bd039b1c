"""Adapters as plain LoRA folders of PEFT, and as adapters of llama.cpp: what they compute, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import made
import pytest
import torch
import transformers
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

import tiny
from eckart import compress_to
from eckart.adapters import adapt
from eckart.export import export
from eckart.testing.adapters import settings_of

PLAIN = """
import sys, torch
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert "eckart" not in sys.modules
print(float(model(input_ids=torch.tensor([[5, 6, 7]])).logits.double().sum()))
"""


def moved(model: Any, scale: float = 0.3) -> Any:
    """The model with random numbers added to all that is trained."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def saved(folder: Path, key: str, base: str = "llama", **settings: Any) -> Any:
    """An adapter on the model `base` of a folder, saved beside it as `adapter`."""
    if not (folder / base).exists():
        tiny.save_model(folder / base, base, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder / base)
    adapted = moved(adapt(model, key, task_type="CAUSAL_LM", **settings))
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return adapted


def read(folder: Path, base: Path, cls: Any = AutoModelForCausalLM, **more: Any) -> Any:
    return PeftModel.from_pretrained(cls.from_pretrained(base, dtype=torch.float32, **more), folder).eval()


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(
    ("key", "base", "settings"),
    [("svfit", "llama", {"rank": 4}), ("s2_lora", "gpt2", {"rank": 4}), ("svfit", "qwen3", {"energy": 0.6})],
)
def test_a_lora_computes_what_the_adapter_does(tmp_path: Path, key: str, base: str, settings: dict[str, Any]) -> None:
    adapted = saved(tmp_path, key, base, **settings)
    found = export(tmp_path / "adapter", "lora", tmp_path / "out")
    config = tiny.read_json(tmp_path / "out/adapter_config.json")
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == str(tmp_path / base)
    assert all(text.endswith(", exact") for text in found.layers.values())
    assert not found.notes
    plain, ids = read(tmp_path / "out", tmp_path / base), made.ids()
    near(made.logits(plain, ids), made.logits(adapted, ids))
    with plain.disable_adapter():
        assert (made.logits(plain, ids) - made.logits(adapted, ids)).abs().max() > 1e-2, "the adapter carries nothing"
    ranks = {name: len(t) for name, t in load_file(tmp_path / "out/adapter_model.safetensors").items() if "lora_A" in name}  # fmt: skip # noqa: E501
    if "energy" in settings:
        assert len(set(ranks.values())) > 1
        assert config["rank_pattern"] == config["alpha_pattern"] != {}
    else:
        assert set(ranks.values()) == {4}


def test_a_smaller_rank_is_the_nearest_and_its_error_is_said(tmp_path: Path) -> None:
    adapted = saved(tmp_path, "svfit", rank=6)
    found = export(tmp_path / "adapter", "lora", tmp_path / "out", rank=2)
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    M = adapted.get_base_model().get_submodule(name).get_delta_weight("default").detach()
    left, right = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
    assert right.shape == (2, 32)
    values = torch.linalg.svdvals(M.double())
    best = float(values[2:].norm() / values.norm())
    assert float((M - left @ right).norm() / M.norm()) == pytest.approx(best, rel=1e-3)
    assert found.layers[name] == f"rank 2, relative error {best:.2g}"
    assert "21 of 21 layers are approximated; the worst is" in found.notes[0]
    with pytest.raises(ValueError, match=r"21 of 21 layers are approximated.*Raise --rank"):
        export(tmp_path / "adapter", "lora", tmp_path / "strict", rank=2, strict=True)
    assert {p.name for p in tmp_path.iterdir()} == {"llama", "adapter", "out"}


def test_what_has_no_rank_of_its_own_is_asked_for_one(tmp_path: Path) -> None:
    adapted = saved(tmp_path, "snell", rank=4)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+: the change .* has no rank of its own: .* --rank R"):
        export(tmp_path / "adapter", "lora", tmp_path / "out")
    export(tmp_path / "adapter", "lora", tmp_path / "out", rank=99)
    ids = made.ids()
    near(made.logits(read(tmp_path / "out", tmp_path / "llama"), ids), made.logits(adapted, ids))


def test_a_classifier_goes_along(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "bert", "bert", dtype=torch.float32)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=5)
    words = {"modules_to_save": ["classifier", "bert.pooler.dense"], "task_type": "SEQ_CLS"}
    adapted = moved(adapt(model, "svfit", rank=3, **words))
    adapted.save_pretrained(tmp_path / "adapter")
    found = export(tmp_path / "adapter", "lora", tmp_path / "out")
    assert found.notes == ["saved whole beside the LoRA: bert.pooler.dense, classifier"]
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=5).eval()
    near(made.logits(again, made.ids()), made.logits(adapted, made.ids()))
    with pytest.raises(ValueError, match=r"a Bert\w+ cannot be exported to GGUF"):
        export(tmp_path / "adapter", "gguf", tmp_path / "gguf")


def test_convolutions_become_convolutions(tmp_path: Path) -> None:
    tiny.build("vit").save_pretrained(tmp_path / "vit")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "vit")
    adapted = moved(adapt(model, "svfit", rank=3, target_modules=["projection", "intermediate.dense"]))
    adapted.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", "lora", tmp_path / "out")
    shapes = [t.shape for n, t in load_file(tmp_path / "out/adapter_model.safetensors").items() if "projection" in n]
    assert sorted(shapes) == [(3, 3, 4, 4), (32, 3, 1, 1)]
    plain = read(tmp_path / "out", tmp_path / "vit", AutoModelForImageClassification)
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        near(plain(pixel_values=x).logits, adapted(pixel_values=x).logits)


def test_convolutions_of_one_dimension_become_such(tmp_path: Path) -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, conv_dim=(6, 6),
        conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "speech")
    base = transformers.Wav2Vec2Model.from_pretrained(tmp_path / "speech")
    adapted = moved(adapt(base, "svfit", rank=3, target_modules=["conv_layers.1.conv"]))
    adapted.save_pretrained(tmp_path / "adapter")
    export(tmp_path / "adapter", "lora", tmp_path / "out")
    shapes = [tuple(t.shape) for t in load_file(tmp_path / "out/adapter_model.safetensors").values()]
    assert sorted(shapes) == [(3, 6, 3), (6, 3, 1)]
    plain = read(tmp_path / "out", tmp_path / "speech", transformers.Wav2Vec2Model)
    x = torch.randn(1, 60, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = adapted(input_values=x).last_hidden_state
        near(plain(input_values=x).last_hidden_state, wanted)
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(input_values=x).last_hidden_state, wanted, atol=1e-3)


def test_a_convolution_that_pefts_lora_does_not_follow_is_refused(tmp_path: Path) -> None:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=8, patch_size=2, num_labels=3
    )
    transformers.ConvNextForImageClassification(config).save_pretrained(tmp_path / "net")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "net")
    moved(adapt(model, "lora_c", rank=2, target_modules=["dwconv"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"dwconv is a grouped convolution \(Conv2d, groups=8\) with settings that the"
    ):
        export(tmp_path / "adapter", "lora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_compressed_base_gets_its_lora_on_top(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "m", dtype=torch.float32)
    compress_to(tmp_path / "small", tmp_path / "m", "svd", budget=0.8)
    adapted = saved(tmp_path, "svfit", "small", rank=4)
    export(tmp_path / "adapter", "lora", tmp_path / "out")
    near(made.logits(read(tmp_path / "out", tmp_path / "small"), made.ids()), made.logits(adapted, made.ids()))


@pytest.mark.parametrize(
    "words", [{"lora_alpha": 5}, {"init_lora_weights": "pissa"}, {"use_dora": True}, {"use_rslora": True}], ids=str
)
def test_adapters_of_pefts_own_fit_the_base_as_it_was(tmp_path: Path, words: dict[str, Any]) -> None:
    tiny.save_model(tmp_path / "m", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **words)
    adapted = moved(get_peft_model(base, config))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    wanted = made.logits(read(tmp_path / "adapter", tmp_path / "m"), made.ids())
    rank = 32 if "use_dora" in words else None
    export(tmp_path / "adapter", "lora", tmp_path / "out", rank=rank)
    assert tiny.read_json(tmp_path / "out/adapter_config.json")["init_lora_weights"] is True
    near(made.logits(read(tmp_path / "out", tmp_path / "m"), made.ids()), wanted)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_llama_cpps_adapter_is_what_merging_adds(tmp_path: Path, family: str) -> None:
    tokenizer = made.byte_tokenizer()
    made.save(made.decoder(family, tokenizer, torch.float32), tmp_path / "m", tokenizer)
    adapted = moved(adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), "svfit", rank=4, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    found = export(tmp_path / "adapter", "gguf", tmp_path / "out")
    assert set(found.files) == {"adapter.gguf"}
    made.save(adapted.merge_and_unload(), tmp_path / "merged", tokenizer)
    for name in ("m", "merged"):
        export(tmp_path / name, "gguf", tmp_path / f"{name}-gguf")
    base, merged = (_tensors(tmp_path / f"{name}-gguf/model.gguf") for name in ("m", "merged"))
    update = _tensors(tmp_path / "out/adapter.gguf")
    assert len(update) == 2 * len(found.layers) == 28
    for name in {n.rpartition(".")[0] for n in update}:
        added = update[f"{name}.lora_b"] @ update[f"{name}.lora_a"]
        assert added.norm() > 0.1
        near(base[name] + added, merged[name])


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    return {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(file).tensors}


def test_what_a_lora_cannot_hold_is_refused_with_the_reason(tmp_path: Path) -> None:
    saved(tmp_path, "compacter", **settings_of("compacter"))
    for to in ("lora", "gguf"):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: .* is not a matrix"):
            export(tmp_path / "adapter", to, tmp_path / "out")
    (tmp_path / "adapter").rename(tmp_path / "bottleneck")
    saved(tmp_path, "svfit", rank=4, bias="all")
    for words, message in (
        ({"to": "lora"}, r"holds trained biases \(bias='all'\)"),
        ({"to": "peft"}, "is an adapter, and 'peft' is not for adapters: write it as lora or gguf"),
        ({"to": "loras"}, "unknown target 'loras'; did you mean 'lora'"),
        ({"to": "lora", "rank": 0}, "a LoRA of rank 0 holds nothing"),
        ({"to": "lora", "base": str(tmp_path / "nowhere")}, "There is no model at"),
    ):
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "adapter", out=tmp_path / "out", **words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no folder of an adapter, and 'lora' is not for models"):
        export(tmp_path / "llama", "lora", tmp_path / "out")
    with pytest.raises(ValueError, match="--rank and --base are for adapters"):
        export(tmp_path / "llama", "gguf", tmp_path / "out", rank=3)
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(config.read_text().replace("ECKART_SVFIT", "ECKART_OTHER"))
    with pytest.raises(ValueError, match="is not of an adapter that PEFT or eckart knows"):
        export(tmp_path / "adapter", "lora", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"llama", "adapter", "bottleneck"}


@pytest.mark.slow
def test_peft_reads_it_without_this_library(tmp_path: Path) -> None:
    adapted = saved(tmp_path, "svfit", rank=4)
    export(tmp_path / "adapter", "lora", tmp_path / "out")
    words = [sys.executable, "-c", PLAIN, str(tmp_path / "out")]
    told = subprocess.run(words, check=True, capture_output=True, text=True)
    wanted = float(made.logits(adapted, torch.tensor([[5, 6, 7]])).double().sum())
    assert float(told.stdout.split()[-1]) == pytest.approx(wanted, abs=1e-2)
    words[-1] = str(tmp_path / "adapter")
    refused = subprocess.run(words, check=False, capture_output=True, text=True)
    assert "KeyError: 'ECKART_SVFIT'" in refused.stderr
