"""The queries, keys and values that attention really uses, rebuilt from the anatomy alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from anatomy_zoo import CONFIGS, Case, build, trace
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from eckart.anatomy import Attention, Projection, anatomy

Heads = Float[Tensor, "batch heads tokens head_dim"]
SEEN: dict[nn.Module, tuple[Heads, Heads, Heads, float, Heads]] = {}


def capture(
    module: nn.Module, query: Heads, key: Heads, value: Heads, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention that keeps what it was given and what it gave."""
    group = query.shape[1] // key.shape[1]
    scores = scaling * query @ key.repeat_interleave(group, 1).mT
    output = (scores if mask is None else scores + mask).softmax(-1) @ value.repeat_interleave(group, 1)
    SEEN[module] = query, key, value, scaling, output
    return output.transpose(1, 2), None


AttentionInterface.register("capture", capture)
AttentionMaskInterface.register("capture", eager_mask)


def captured(name: str) -> Case:
    model = build(name)
    model.set_attn_implementation("capture")
    return Case(model, anatomy(model), trace(model))


def heads(case: Case, projection: Projection, head_dim: int) -> Heads:
    """The outputs of a logical matrix, head by head."""
    rows = case.trace.outputs[projection.module][..., projection.index()]
    return rows.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(case: Case, attention: Attention, x: Heads, layer: int) -> Heads:
    """Each pair (a, b) of a head turned by position * frequency, straight from the definition."""
    if attention.rotary is None:
        return x
    buffers = dict(case.module(case.anatomy.base).rotary_emb.named_buffers())
    kind = (getattr(case.model.config, "layer_types", None) or [""] * 9)[layer]
    frequencies = buffers.get(f"{kind}_inv_freq", buffers.get("inv_freq"))
    assert frequencies is not None
    x = x.clone()
    for frequency, (a, b) in zip(frequencies, attention.rotary.pairs(), strict=True):
        angle = torch.arange(x.shape[2]) * frequency
        x[..., a], x[..., b] = (
            x[..., a] * angle.cos() - x[..., b] * angle.sin(),
            x[..., b] * angle.cos() + x[..., a] * angle.sin(),
        )
    return x


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mpnet"])
@torch.no_grad()
def test_slices_rotation_and_scale_rebuild_attention(name: str) -> None:
    case = captured(name)
    for layer, block in enumerate(case.anatomy.blocks):
        a = block.attention
        query, key, value, scaling, output = SEEN[case.module(a.name)]
        q, k, v = (heads(case, p, a.head_dim) for p in (a.q, a.k, a.v))
        if a.qk_norm:
            q, k = (case.module(norm)(x) for norm, x in zip(a.qk_norm, (q, k), strict=True))
        assert (q.shape[1], k.shape[1], v.shape[1]) == (a.heads, a.kv_heads, a.kv_heads)
        torch.testing.assert_close(v, value)
        torch.testing.assert_close(rotate(case, a, k, layer), key, rtol=1e-4, atol=1e-4)
        # OPT scales its queries before attention, so only the product with the scale is comparable
        torch.testing.assert_close(rotate(case, a, q, layer) * a.scale, query * scaling, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(case.trace.rows(a.o.module), output.transpose(1, 2).flatten(2).flatten(0, -2))


@torch.no_grad()
def test_mpnet_attends_with_its_position_bias() -> None:
    model = build("mpnet")
    case = Case(model, anatomy(model), trace(model))
    bias = case.module("mpnet.encoder").compute_position_bias(torch.zeros(2, 7, 32))
    assert case.anatomy.position_bias == "mpnet.encoder.relative_attention_bias"
    for block in case.anatomy.blocks:
        a = block.attention
        q, k, v = (heads(case, p, a.head_dim) for p in (a.q, a.k, a.v))
        output = (a.scale * q @ k.mT + bias).softmax(-1) @ v
        torch.testing.assert_close(case.trace.rows(a.o.module), output.transpose(1, 2).flatten(2).flatten(0, -2))


def test_the_scale_follows_the_config() -> None:
    gemma, by_layer, llama = (anatomy(build(n, "meta")).blocks for n in ("gemma2", "gpt2-by-layer", "llama"))
    assert gemma[0].attention.scale == pytest.approx(9**-0.5)
    assert by_layer[1].attention.scale == pytest.approx(8**-0.5 / 2)
    assert llama[0].attention.scale == pytest.approx(8**-0.5)
