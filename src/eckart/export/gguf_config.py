"""What GGUF says of a model beside its tensors, and which models llama.cpp computes as transformers does."""

from __future__ import annotations

from typing import Any

import gguf
import torch
from jaxtyping import Float
from torch import Tensor

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""transformers' `model_type` -> the architecture of the same name in GGUF."""


def check_supported(config: Any) -> str:
    """The model's architecture. Raises `ValueError` where llama.cpp would not compute the same."""
    arch, known = config.model_type, ", ".join(ARCHITECTURES)
    if arch not in ARCHITECTURES or not (config.architectures or [""])[0].endswith("ForCausalLM"):
        raise ValueError(f"a {(config.architectures or [arch])[0]} cannot be exported to GGUF: only causal language models of the types {known} can; export to peft or onnx")  # fmt: skip # noqa: E501
    rope = config.rope_parameters["rope_type"]
    if rope not in ("default", "linear", "llama3") or (rope == "llama3" and arch != "llama"):
        raise ValueError(f"this {arch} has rotary positions of the type {rope!r}, which eckart cannot export to GGUF; export to peft or onnx")  # fmt: skip # noqa: E501
    if config.hidden_act != "silu":
        raise ValueError(f"llama.cpp computes {arch} with the activation 'silu', this model has {config.hidden_act!r}; export to peft or onnx")  # fmt: skip # noqa: E501
    if getattr(config, "use_sliding_window", False):
        raise ValueError(f"llama.cpp computes {arch} without the sliding window that this model has; export to peft or onnx")  # fmt: skip # noqa: E501
    return arch


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_hyperparameters(writer: gguf.GGUFWriter, model: Any) -> None:
    """Write the sizes and constants of a model that `check_supported` lets pass, and its rotary factors."""
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(model).numpy())


def rope_factors(model: Any) -> Float[Tensor, " pairs"]:
    """What the plain rotary frequencies are divided by in this model."""
    dim, theta = head_dim(model.config), model.config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, dim, 2).double() / dim)
    return (plain / model.model.rotary_emb.inv_freq.double()).float()
