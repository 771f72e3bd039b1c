"""Slicing the residual stream: invariance before anything is deleted, order of errors after it, saving, messages."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

import eckart
import tiny
from eckart.allocation import Budget, BudgetError
from eckart.calibration.calibrate import Request
from eckart.calibration.subject import InMemory
from eckart.checkpoint.hf import EckartConfig, describe, install
from eckart.compression.residual_stream import Point, ResidualStream
from eckart.compression.slicegpt import SliceGPT
from eckart.forms.residual import ResidualWriter, StreamNorm
from eckart.jobs.engine import Engine
from eckart.jobs.method import Job
from eckart.jobs.trial import Trial
from eckart.metrics import Statistics

D, VOCABULARY, DEPTH = 32, 60, 2
PLENTY = "1GB"
CORE: dict[str, Any] = {
    "hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = {**CORE, "intermediate_size": 48}
GQA = {**GATED, "num_key_value_heads": 2}
OPT = {**CORE, "ffn_dim": 40, "word_embed_proj_dim": D}
GPT2 = {
    "n_embd": D, "n_layer": DEPTH, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {**GQA, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": (tf.LlamaConfig, {**GQA, "tie_word_embeddings": True}),
    "gemma": (tf.GemmaConfig, {**GATED, "num_key_value_heads": 1, "head_dim": 16}),
    "opt": (tf.OPTConfig, OPT),
    "opt-no-affine": (tf.OPTConfig, {**OPT, "layer_norm_elementwise_affine": False, "enable_bias": False}),
    "gpt2": (tf.GPT2Config, GPT2),
    "neox": (tf.GPTNeoXConfig, GATED),
    "neox-sequential": (tf.GPTNeoXConfig, {**GATED, "use_parallel_residual": False}),
    "phi": (tf.PhiConfig, GATED),
    "phi-tied": (tf.PhiConfig, {**GATED, "tie_word_embeddings": True}),
    "phi3": (tf.Phi3Config, GQA),
}
MAIN = ("llama", "gemma", "opt", "gpt2", "phi")


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model, every parameter random, norms and biases too."""
    cls, settings = CONFIGS[name]
    model = tf.AutoModelForCausalLM.from_config(cls(**settings), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


def concentrated(name: str) -> Any:
    """One whose stream has a falling spectrum, in a basis that is not the coordinates' own."""
    model = build(name)
    basis, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)))
    squeeze = basis @ torch.diag(0.8 ** torch.arange(D)) @ basis.T
    for inner, module in model.named_modules():
        if inner.endswith(("embed_tokens", "embed_positions", "wte", "wpe")):
            module.weight.data = module.weight.data @ squeeze
        elif inner.endswith(("o_proj", "down_proj", "out_proj", "fc2")):
            module.weight.data = squeeze @ module.weight.data
        elif inner.endswith("c_proj"):
            module.weight.data = module.weight.data @ squeeze
    return model


def batch(rows: int = 4, length: int = 20, seed: int = 1) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor] | None = None) -> Float[Tensor, "b length v"]:
    return model(**(inputs or batch())).logits


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def sliced(model: Any, budget: str = PLENTY, data: Any = None, **settings: Any) -> Any:
    """A copy of the model, sliced."""
    return eckart.compress(copy.deepcopy(model), "slicegpt", budget=budget, data=data or [batch()], **settings)


@dataclass(frozen=True)
class RandomBases(SliceGPT):
    """The same with bases that know nothing of the data."""

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        return Request(probes={}, needs=frozenset())

    def signal(self, job: Job, point: int) -> Float[Tensor, "d d"]:
        draw = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(point))
        return draw @ draw.T


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_changes_before_deletion(name: str) -> None:
    model = build(name)
    changed, result = sliced(model, width=D)
    assert apart(logits(changed), logits(model)) < 1e-5
    assert {layer.form for layer in result.layers} == {f"dense(width={D})", "diagonal()"}


@pytest.mark.parametrize("name", ["opt", "gpt2", "phi"])
def test_nothing_changes_in_float64(name: str) -> None:
    model = build(name, torch.float64)
    changed, _ = eckart.compress(copy.deepcopy(model), RandomBases(width=D), budget=PLENTY)
    assert apart(logits(changed), logits(model)) < 1e-11


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_error_falls_with_the_width_and_random_bases_are_far_worse(name: str) -> None:
    model = concentrated(name)
    dense = logits(model)
    widths = (8, 16, 24, 28)
    pca = [apart(logits(sliced(model, width=k).model), dense) for k in widths]
    random = [
        apart(logits(eckart.compress(copy.deepcopy(model), RandomBases(width=k), budget=PLENTY).model), dense)
        for k in widths
    ]
    assert all(a > 1.2 * b for a, b in itertools.pairwise(pca))
    assert all(a < 0.1 * b for a, b in zip(pca, random, strict=True))


def test_the_norm_divides_by_the_width_before() -> None:
    model = concentrated("llama")
    changed, _ = sliced(model, width=16)
    right = apart(logits(changed), logits(model))
    for module in changed.modules():
        if isinstance(module, StreamNorm):
            assert module.divisor == D
            module.divisor = 16
    assert right < 0.1 * apart(logits(changed), logits(model))


def test_orientations_agree() -> None:
    model = concentrated("llama")
    random, ordered = (sliced(model, width=24, orientation=o).model for o in ("random", "pca"))
    assert apart(logits(random), logits(ordered)) < 1e-4
    embeddings = [m.model.embed_tokens.weight.square().sum(0) for m in (random, ordered)]
    assert float(embeddings[0].max() / embeddings[0].min()) < 100 < float(embeddings[1].max() / embeddings[1].min())


def signals(method: SliceGPT, rows: Float[Tensor, "n d"], width: int) -> Float[Tensor, "d k"]:
    """The basis that a method takes for a stream with these rows."""
    found = Statistics()
    found.add_inputs(rows, frozenset({"outer"}))
    stream = ResidualStream(rows.shape[1], False, (Point("norm", 0),), ())
    job: Any = SimpleNamespace(scratch={(method, "stream"): stream}, statistics=lambda name, part: found, seed=0)
    return method.basis(job, 0, width)


def test_principal_components() -> None:
    line = torch.tensor([3.0, 4.0, 0.0]) / 5
    method = SliceGPT(orientation="pca")
    found = signals(method, torch.linspace(-1, 1, 9)[:, None] * line, 1)
    torch.testing.assert_close(found[:, 0].abs(), line.double())
    axes = signals(method, torch.diag(torch.tensor([1.0, 3.0, 2.0])), 3)
    torch.testing.assert_close(axes.abs(), torch.eye(3, dtype=torch.float64)[:, [1, 2, 0]])
    mixed = signals(SliceGPT(), torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
    torch.testing.assert_close(mixed @ mixed.T, torch.diag(torch.tensor([0.0, 1, 1], dtype=torch.float64)))


def test_parameters_are_counted_by_the_formula() -> None:
    k, q, kv, ff = 24, D, D // 2, 48
    changed, result = sliced(build("llama"), width=k)
    attention = q * k + 2 * kv * k + k * q + (q + 2 * kv + k)
    block = attention + 3 * k * ff + (2 * ff + k) + 2 * k * k
    count = 2 * VOCABULARY * k + DEPTH * block
    assert sum(p.numel() for p in changed.parameters()) == count
    assert sum(layer.bytes for layer in result.layers) == 4 * count
    parallel, _ = sliced(build("phi"), width=k)
    assert sum("shortcut" in name for name, _ in parallel.named_parameters()) == DEPTH


def test_predicted_loss_is_the_energy_of_the_signal_that_is_cut_off() -> None:
    model = concentrated("gpt2")
    seen: list[Tensor] = []
    handle = model.transformer.h[1].ln_2.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    logits(model)
    handle.remove()
    rows = seen[0].double().flatten(0, 1)
    energies = torch.linalg.svdvals(rows - rows.mean(1, keepdim=True)).square() / len(rows)
    layers = {layer.name: layer for layer in sliced(model, width=16).result.layers}
    reader, writer = layers["transformer.h.1.mlp.c_fc"], layers["transformer.h.1.attn.c_proj"]
    assert reader.predicted_error == pytest.approx(float(energies[16:].sum()), rel=2e-2)  # summed in float32
    assert reader.measured_error == pytest.approx(reader.predicted_error, rel=1e-6)
    assert reader.energy == pytest.approx(float(energies.sum()), rel=1e-4)
    assert writer.predicted_error == reader.predicted_error
    assert "shortcut of 16 x 16" in str(writer.note)


def test_padding_is_not_seen() -> None:
    model = concentrated("opt")
    inputs = batch()["input_ids"]
    padded = {
        "input_ids": torch.cat([inputs, torch.zeros(4, 5, dtype=torch.long)], 1),
        "attention_mask": torch.cat([torch.ones(4, 20), torch.zeros(4, 5)], 1).long(),
    }
    one, other = (sliced(model, data=[data], width=16).model for data in (batch(), padded))
    assert apart(logits(one), logits(other)) < 1e-4


@pytest.mark.parametrize("name", [*MAIN, "phi-tied", "neox"])
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    changed, _ = sliced(build(name), width=24)
    changed.save_pretrained(tmp_path / "one")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "one").eval()
    assert torch.equal(logits(loaded), logits(changed))
    assert loaded.config.hidden_size == D
    loaded.save_pretrained(tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("name", ["llama-tied", "phi-tied", "gpt2", "gemma"])
def test_from_folder_to_folder(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "dense")
    result = eckart.compress_to(tmp_path / "out", tmp_path / "dense", "slicegpt", budget=0.9, data=[batch()])
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) == result.bytes_after <= result.budget
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    width = loaded.get_input_embeddings().embedding_dim
    assert width % 8 == 0
    assert torch.allclose(logits(loaded), logits(sliced(model, width=width).model), atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with pytest.raises(BudgetError):
        sliced(model, budget="0.9", width=width + 8)
    heads = [layer for layer in result.layers if layer.note and "untied" in layer.note]
    assert len(heads) == 1
    assert sum(layer.bytes for layer in result.layers) == sum(t.nbytes for f in files for t in load_file(f).values())


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    build("llama-tied").save_pretrained(tmp_path / "m")
    tiny.compressed_twice(tmp_path, "slicegpt", parts=2, budget=0.9, data=[batch()])
    assert tiny.hashes(tmp_path / "whole") == tiny.hashes(tmp_path / "cut")


@pytest.mark.parametrize("name", MAIN)
def test_generation_with_a_cache(name: str) -> None:
    changed, _ = sliced(build(name), width=24)
    clone = copy.deepcopy(changed)
    prompt = {"input_ids": batch(2, 6)["input_ids"], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    cached = changed.generate(**prompt, **settings)
    assert torch.equal(cached, clone.generate(**prompt, **settings, use_cache=False))
    for model in (changed, clone):
        assert all(m.tap is None or m.tap.stream is None for m in model.modules() if isinstance(m, StreamNorm))
    taps = {id(m.tap) for m in changed.modules() if isinstance(m, ResidualWriter)}
    assert taps.isdisjoint(id(m.tap) for m in clone.modules() if isinstance(m, ResidualWriter))


def test_gradients_reach_everything_and_adapters_merge() -> None:
    peft = pytest.importorskip("peft")
    changed, _ = sliced(build("llama"), width=24)
    changed.requires_grad_(True)
    ids = batch()["input_ids"]
    changed(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in changed.parameters())
    adapted = peft.get_peft_model(changed, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    before = logits(adapted.eval())
    assert apart(logits(adapted.merge_and_unload()), before) < 1e-5


def test_a_plan_is_tried_and_taken_back(tmp_path: Path) -> None:
    model = concentrated("gpt2")
    dense, text = logits(model), batch(seed=5)
    engine = Engine(InMemory(model), SliceGPT(width=16), Budget.parse(PLENTY), [batch()], tmp_path)
    plan = engine.plan()
    tried = Trial(engine.job, [text], tmp_path / "trial")(engine.method, plan)
    assert torch.equal(logits(model), dense)
    engine.fit(plan)
    predicted = logits(model, text)[:, :-1].transpose(1, 2)
    assert tried == pytest.approx(float(nn.functional.cross_entropy(predicted, text["input_ids"][:, 1:])), rel=1e-5)


def test_another_method_after_it(tmp_path: Path) -> None:
    changed, _ = sliced(build("llama"), width=24)
    factored, _ = eckart.compress(changed, form="low_rank(rank=4)", budget=0.9, data=[batch()])
    assert isinstance(factored.model.layers[0].self_attn.o_proj, ResidualWriter)
    factored.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert apart(logits(loaded), logits(factored)) < 1e-6
    assert [step["method"] for step in loaded.config.quantization_config.history] == ["slicegpt", None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orientation": "none"}, "neither 'random' nor 'pca'"),
        ({"multiple": 0}, "multiple of a positive integer"),
        ({"multiple": 64}, "only 32 wide"),
        ({"width": 40}, "only 32 wide"),
        ({"width": 0}, "positive integer"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"widht": 8}, "has no setting 'widht'; did you mean 'width'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliced(build("llama"), **settings)


def test_budgets_that_cannot_be_met() -> None:
    model = build("llama-tied")
    with pytest.raises(BudgetError, match=r"the smallest possible is \d+ bytes, at width 8"):
        sliced(model, budget="1KB")
    with pytest.raises(BudgetError) as caught:
        sliced(model, budget="1.0", width=D)
    said = str(caught.value)
    assert f"the 4 shortcuts of 32 x 32 add {4 * 4 * D * D} bytes" in said
    assert f"lm_head, which can no longer be tied, adds {4 * VOCABULARY * D}" in said
    assert "the widest that fits is 24" in said
    with pytest.raises(ValueError, match="needs calibration data"):
        eckart.compress(build("llama"), "slicegpt", budget=0.9)


SANDWICH = {
    **GATED, "num_key_value_heads": 1, "head_dim": 16, "query_pre_attn_scalar": 9, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("auto", "config", "message"),
    [
        (tf.AutoModelForCausalLM, tf.Gemma2Config(**SANDWICH), r"0.post_attention_layernorm stands between"),
        (tf.AutoModelForCausalLM, tf.Gemma3TextConfig(**SANDWICH), r"post_attention_layernorm stands between"),
        (tf.AutoModelForMaskedLM, tf.BertConfig(**GATED), r"norms the stream after each sum"),
        (tf.AutoModelForCausalLM, tf.OPTConfig(**{**OPT, "word_embed_proj_dim": 24}), r"project_in stands between"),
        (tf.AutoModelForCausalLM, tf.OPTConfig(**OPT, do_layer_norm_before=False), r"norms the stream after each sum"),
        (tf.AutoModel, tf.LlamaConfig(**GQA), r"has no head"),
        (tf.AutoModelForCausalLM, tf.GPT2Config(**GPT2, add_cross_attention=True), r"not known how .*crossattention"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_rotated(auto: Any, config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliced(auto.from_config(config).eval())


def test_a_compressed_model_is_refused() -> None:
    once, _ = sliced(build("llama"), width=24)
    with pytest.raises(ValueError, match="compressed already"):
        sliced(once, width=16)
    factored, _ = eckart.compress(build("llama"), "svd", budget=0.9)
    with pytest.raises(ValueError, match=r"q_proj is compressed already \(FactoredLinear\)"):
        sliced(factored, width=16)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.layers.0.mlp.down_proj", {"norm": "model.norm"}, "needs a norm of width 24"),
        ("model.layers.0.mlp.down_proj", {"norm": "nowhere"}, "needs a norm of width 24"),
        ("model.layers.0.mlp.down_proj", {"norm": 3}, "not the name of a norm"),
        ("model.layers.0.mlp.up_proj", {"shape": [10**9, 24]}, "larger than the model's"),
        ("model.layers.0.mlp.up_proj", {"shape": [True, 24]}, "not the shape of a matrix"),
        ("model.layers.0.mlp.up_proj", {"shape": [48, -24]}, "not the shape of a matrix"),
        ("model.layers.0.mlp", {"kind": "narrow", "shape": [4, 4]}, "the model has LlamaMLP"),
        ("model.layers.0", {"kind": "stream_norm"}, "the model has LlamaDecoderLayer"),
        ("model.norm", {"width": "24"}, "not a width"),
        ("model.norm", {"width": 64}, "not a width"),
        ("model.norm", {"eps": "tiny"}, "not the eps"),
    ],
)
def test_hostile_descriptions(name: str, change: dict[str, Any], message: str) -> None:
    modules = describe(sliced(build("llama"), width=24).model)
    modules["model.norm"]["width"] = 20 if "model.norm" in change.values() else 24
    modules[name] = {**modules.get(name, {}), **change}
    with pytest.raises(ValueError, match=message):
        install(build("llama"), EckartConfig(modules), torch.float32)


def test_a_writer_needs_its_norm() -> None:
    changed, _ = sliced(build("llama"), width=24)
    with pytest.raises(RuntimeError, match=r"without the norm 'model.layers.0.post_attention_layernorm'"):
        changed.model.layers[0].mlp.down_proj(torch.zeros(1, 48))
