"""Models that anatomy does not know, and the generic list that works on them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from anatomy_zoo import CONFIGS, GATED, build
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from eckart.anatomy import LinearSite, UnknownModel, anatomy, features, linears


def mamba() -> nn.Module:
    return tf.AutoModelForCausalLM.from_config(tf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20))


def t5() -> nn.Module:
    settings = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    return tf.T5ForConditionalGeneration(tf.T5Config(**settings))


@pytest.mark.parametrize(("make", "model_type", "cls"), [(mamba, "mamba", "MambaForCausalLM"), (t5, "t5", "T5For")])
def test_an_unknown_type_is_named_with_the_way_out(make: Any, model_type: str, cls: str) -> None:
    with torch.device("meta"):
        model = make()
    with pytest.raises(UnknownModel, match=f"does not know the model type '{model_type}' \\({cls}") as error:
        anatomy(model)
    assert "it knows bert, gemma" in str(error.value)
    assert "linears(model)" in str(error.value)
    assert "FAMILIES" in str(error.value)
    sites = linears(model)
    assert len(sites) > 3
    assert any(site.block == 0 for site in sites)


def test_a_module_without_a_config() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with pytest.raises(ValueError, match=r"Sequential has no config\.model_type.*linears\(model\)"):
        anatomy(model)
    assert linears(model) == [
        LinearSite("0", "linear", (4, 3), True, None, None),
        LinearSite("2", "linear", (2, 4), False, None, None),
    ]


def test_a_known_config_on_an_unknown_module() -> None:
    model = nn.Linear(2, 2)
    model.config = tf.LlamaConfig()
    with pytest.raises(UnknownModel, match="Linear is of type 'llama', but no module of it holds both 'layers' and"):
        anatomy(model)


def test_two_transformers_in_one_model() -> None:
    with torch.device("meta"):
        bert = tf.BertConfig(**GATED)
        model = tf.EncoderDecoderModel(tf.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert))
    with pytest.raises(UnknownModel, match=r"several transformers \('encoder', 'decoder.bert'\); give anatomy one"):
        anatomy(model)
    assert anatomy(model.get_submodule("decoder")).head == "cls.predictions.decoder"


def test_a_missing_part_is_named() -> None:
    model = build("llama", "meta")
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(UnknownModel, match=r"should have a module 'model\.layers\.1\.mlp\.gate_proj'.*has none"):
        anatomy(model)


def test_a_part_without_sizes_is_named() -> None:
    model = build("llama", "meta")
    model.model.layers[1].self_attn.q_proj = nn.Identity()
    with pytest.raises(UnknownModel, match=r"'model\.layers\.1\.self_attn\.q_proj' \(Identity\).*out_features"):
        anatomy(model)


def test_a_norm_without_eps_is_named() -> None:
    model = build("llama", "meta")
    model.model.norm = nn.Identity()
    with pytest.raises(UnknownModel, match=r"norm 'model\.norm' \(Identity\) does not state its eps"):
        anatomy(model)


@pytest.mark.parametrize(
    ("name", "path", "rows"),
    [
        ("llama", "model.layers.1.self_attn.k_proj", 12),
        ("phi3", "model.layers.0.self_attn.qkv_proj", 60),
        ("phi3", "model.layers.0.self_attn.qkv_proj", 32),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value", 32),
    ],
)
def test_heads_that_do_not_fit_are_an_error(name: str, path: str, rows: int) -> None:
    model = build(name, "meta")
    model.set_submodule(path, nn.Linear(32, rows, device="meta"))
    with pytest.raises(UnknownModel, match=rf"{rows} key .* 32 inputs, which does not make 4 heads"):
        anatomy(model)


def test_linears_of_every_kind() -> None:
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(11, 4),
            "list": nn.ModuleList([nn.ModuleList([nn.Linear(4, 5), Conv1D(6, 4)]), nn.Conv2d(4, 8, (3, 2), groups=2)]),
            "head": nn.Linear(4, 11),
            "norm": nn.LayerNorm(4),
        }
    )
    model["head"].weight = model["table"].weight
    assert linears(model) == [
        LinearSite("table", "embedding", (11, 4), False, None, None),
        LinearSite("list.0.0", "linear", (5, 4), True, None, 0),
        LinearSite("list.0.1", "conv1d", (6, 4), True, None, 0),
        LinearSite("list.1", "conv2d", (8, 12), True, None, 1),
        LinearSite("head", "linear", (11, 4), True, "table", None),
    ]


def test_linears_of_a_single_layer() -> None:
    assert linears(nn.Linear(2, 3)) == [LinearSite("", "linear", (3, 2), True, None, None)]
    assert linears(nn.ReLU()) == []


def test_a_parametrised_weight_ties_to_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert [site.tied_to for site in linears(model)] == [None, None]


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_the_weights(name: str) -> None:
    model = build(name, "meta")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for site in linears(model):
        weight = model.get_submodule(site.name).weight
        assert site.shape == tuple(weight.T.shape if site.kind == "conv1d" else weight.flatten(1).shape)
        assert site.bias == (f"{site.name}.bias" in parameters)


def test_features_of_modules_that_are_not_linear() -> None:
    assert features(nn.ReLU()) is None
    assert features(nn.Bilinear(2, 3, 4)) is None
