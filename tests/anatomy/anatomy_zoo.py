"""Tiny random models of every family, and a record of what flows through them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as tf
from jaxtyping import Float
from torch import Tensor, nn

from eckart.anatomy import Anatomy, anatomy

WIDTH, DEPTH, HEADS, TOKENS, VOCABULARY = 32, 2, 4, 7, 50
CORE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {**CORE, "intermediate_size": 48}
GQA = {**GATED, "num_key_value_heads": 2}
GEMMA = {**GATED, "num_key_value_heads": 1, "head_dim": 16}
SANDWICH = {
    **GEMMA,
    "query_pre_attn_scalar": 9,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
OPT = {**CORE, "ffn_dim": 40, "word_embed_proj_dim": WIDTH}
GPT2 = {
    "n_embd": WIDTH, "n_layer": DEPTH, "n_head": HEADS, "vocab_size": VOCABULARY, "n_positions": 16,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

CONFIGS: dict[str, tuple[type[tf.PreTrainedConfig], dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {**GQA, "attention_bias": True, "mlp_bias": True}),
    "llama-tied-mha": (tf.LlamaConfig, {**GATED, "tie_word_embeddings": True}),
    "mistral": (tf.MistralConfig, GQA),
    "qwen2": (tf.Qwen2Config, GQA),
    "qwen3": (tf.Qwen3Config, {**GQA, "head_dim": 16}),
    "gemma": (tf.GemmaConfig, GEMMA),
    "gemma2": (tf.Gemma2Config, {**SANDWICH, "attn_logit_softcapping": None}),
    "gemma3": (tf.Gemma3TextConfig, SANDWICH),
    "opt": (tf.OPTConfig, OPT),
    "opt-post-norm": (tf.OPTConfig, {**OPT, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "opt-no-affine": (tf.OPTConfig, {**OPT, "layer_norm_elementwise_affine": False, "enable_bias": False}),
    "gpt2": (tf.GPT2Config, GPT2),
    "gpt2-by-layer": (tf.GPT2Config, {**GPT2, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}),
    "gpt_neox": (tf.GPTNeoXConfig, {**GATED, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gpt_neox-sequential": (tf.GPTNeoXConfig, {**GATED, "use_parallel_residual": False}),
    "phi": (tf.PhiConfig, GATED),
    "phi-gqa-qk-norm": (tf.PhiConfig, {**GQA, "qk_layernorm": True}),
    "phi3": (tf.Phi3Config, GQA),
    "bert": (tf.BertConfig, GATED),
    "mpnet": (tf.MPNetConfig, {**GATED, "pad_token_id": 1}),
    "vit": (tf.ViTConfig, {**GATED, "image_size": 12, "patch_size": 4}),
}


def config(name: str) -> tf.PreTrainedConfig:
    cls, settings = CONFIGS[name]
    return cls(**settings)


def build(name: str, device: str = "cpu", auto: Any = None) -> Any:
    """The model of that name with its usual head, or of the auto class given; every parameter random."""
    usual = {
        "bert": tf.AutoModelForMaskedLM,
        "mpnet": tf.AutoModelForMaskedLM,
        "vit": tf.AutoModelForImageClassification,
    }
    generator = torch.Generator().manual_seed(0)
    with torch.device(device):
        model = (auto or usual.get(name, tf.AutoModelForCausalLM)).from_config(config(name)).eval()
    if device == "cpu":
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@dataclass(frozen=True)
class Trace:
    """First tensor argument and output of every module during one forward pass, by name."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def rows(self, name: str) -> Float[Tensor, "tokens width"]:
        return self.inputs[name].flatten(0, -2)


@dataclass(frozen=True)
class Case:
    model: Any
    anatomy: Anatomy
    trace: Trace

    def module(self, name: str) -> Any:
        return self.model.get_submodule(name)


def inputs(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator)}
    return {"input_ids": torch.randint(3, VOCABULARY, (2, TOKENS), generator=generator)}


def trace(model: Any) -> Trace:
    record = Trace({}, {})

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            result = output[0] if isinstance(output, tuple) else output
            if first is not None and isinstance(result, Tensor):
                record.inputs[name], record.outputs[name] = first.detach(), result.detach()

        return keep

    handles = [module.register_forward_hook(hook(n), with_kwargs=True) for n, module in model.named_modules()]
    with torch.no_grad():
        model(**inputs(model))
    for handle in handles:
        handle.remove()
    return record


@cache
def case(name: str) -> Case:
    model = build(name)
    return Case(model, anatomy(model), trace(model))
