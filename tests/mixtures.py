"""Tiny mixtures of experts, and ways to plant likeness among their experts."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import tiny
from eckart.anatomy import experts

EXPERTS, TOP_K, INNER, WIDTH = 8, 2, 24, 32
CORE: dict[str, Any] = {
    **tiny.GQA, "num_hidden_layers": 2, "intermediate_size": INNER, "num_experts_per_tok": TOP_K,
}  # fmt: skip
CONFIGS: dict[str, tuple[type[tf.PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (tf.MixtralConfig, {**CORE, "num_local_experts": EXPERTS}),
    "qwen2_moe": (
        tf.Qwen2MoeConfig,
        {
            **CORE, "moe_intermediate_size": INNER, "shared_expert_intermediate_size": 40, "num_experts": EXPERTS,
        },
    ),
    "qwen3_moe": (tf.Qwen3MoeConfig, {**CORE, "moe_intermediate_size": INNER, "num_experts": EXPERTS, "head_dim": 8}),
}  # fmt: skip


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A random mixture in evaluation mode, its weights large enough to matter."""
    cls, own = CONFIGS[name]
    model = tf.AutoModelForCausalLM.from_config(cls(**(own | settings))).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.to(dtype)


def permuted(matrices: dict[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """The same expert (gate, up, down) with its hidden units in another order."""
    return {"gate": matrices["gate"][order], "up": matrices["up"][order], "down": matrices["down"][:, order]}


def plant(model: Any, layer: int, groups: list[int], noise: float, permute: bool = True, seed: int = 0) -> None:
    """Let the experts of a layer that are in one group be one expert, up to noise and the order of hidden units."""
    site = experts(model)[layer]
    module: Any = model.get_submodule(site.name)
    generator = torch.Generator().manual_seed(seed)
    both, down = module.gate_up_proj.data.clone(), module.down_proj.data.clone()
    for e, group in enumerate(groups):
        first = groups.index(group)
        order = torch.randperm(site.stack.inner, generator=generator)
        order = order if permute else order.sort().values
        gate, up = both[first].chunk(2)
        own = permuted({"gate": gate, "up": up, "down": down[first]}, order)
        stacked = torch.cat([own["gate"], own["up"]])
        module.gate_up_proj.data[e] = stacked + noise * torch.randn(stacked.shape, generator=generator)
        module.down_proj.data[e] = own["down"] + noise * torch.randn(own["down"].shape, generator=generator)
