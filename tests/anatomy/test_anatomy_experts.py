"""Experts and routers found in mixtures, by structure alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import mixtures
import tiny
from eckart.anatomy import experts
from eckart.forms.experts import Stack
from mixtures import CORE, EXPERTS, INNER, TOP_K, WIDTH


@pytest.mark.parametrize("name", mixtures.CONFIGS)
def test_experts_and_routers(name: str) -> None:
    model = mixtures.build(name)
    found = experts(model)
    shared = ("shared_expert", "shared_expert_gate") if name == "qwen2_moe" else ()
    for i, site in enumerate(found):
        around = f"model.layers.{i}.mlp"
        assert (site.name, site.router) == (f"{around}.experts", f"{around}.gate")
        assert (site.stack, site.top_k) == (Stack(EXPERTS, WIDTH, INNER), TOP_K)
        assert site.beside == tuple(f"{around}.{child}" for child in shared)
        router: Any = model.get_submodule(site.router)
        assert router.weight.shape == (EXPERTS, WIDTH)
    assert len(found) == 2
    with torch.device("meta"):
        assert experts(type(model)(model.config)) == found


def test_layers_without_experts_are_left_out() -> None:
    cls, own = mixtures.CONFIGS["qwen2_moe"]
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(cls(**own, mlp_only_layers=[0]))
        deepseek = tf.DeepseekV3Config(
            **{**CORE, "num_key_value_heads": 4}, moe_intermediate_size=INNER, n_routed_experts=EXPERTS, n_group=1,
            topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8,
        )  # fmt: skip
        other = tf.AutoModelForCausalLM.from_config(deepseek)
    assert [site.name for site in experts(model)] == ["model.layers.1.mlp.experts"]
    assert [(site.name, site.top_k, site.beside) for site in experts(other)] == [
        ("model.layers.1.mlp.experts", TOP_K, ("model.layers.1.mlp.shared_experts",))
    ]
    assert experts(tiny.build("llama")) == []


def test_what_cannot_be_told_is_refused_by_name() -> None:
    model = mixtures.build("mixtral")
    model.model.layers[1].mlp.experts.is_transposed = True
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts: .*is_transposed"):
        experts(model)
    model = mixtures.build("mixtral")
    model.model.layers[0].mlp.gate = nn.Identity()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp does not say which module chooses"):
        experts(model)
