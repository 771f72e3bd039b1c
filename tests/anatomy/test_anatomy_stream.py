"""The residual stream of real models, replayed from the anatomy alone."""

from __future__ import annotations

import pytest
import torch
from anatomy_zoo import CONFIGS, Case, case
from jaxtyping import Float
from torch import Tensor
from transformers.activations import ACT2FN

from eckart.anatomy import Block, Norm

Stream = Float[Tensor, "*batch width"]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def apply_norm(case: Case, norm: Norm | None, x: Stream) -> Stream:
    """The norm as its record describes it."""
    if norm is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    parameters = dict(case.module(norm.name).named_parameters())
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    gain = norm.gain_offset + parameters["weight"] if "weight" in parameters else 1.0
    return x * gain + parameters.get("bias", 0.0)


def replay(case: Case, block: Block, x: Stream) -> tuple[Stream, Stream, Stream]:
    """What attention's readers see, what the MLP's readers see, and the block's output, from the writers' outputs."""
    attention, mlp = (
        apply_norm(case, norm, case.trace.outputs[writer].reshape(x.shape))
        for writer, norm in zip(block.writers(), (block.post_attention_norm, block.post_mlp_norm), strict=True)
    )
    before, between = x, x if block.parallel else x + attention
    if block.pre_norm:
        seen = apply_norm(case, block.attention_norm, before), apply_norm(case, block.mlp_norm, between)
        return *seen, x + attention + mlp
    between = apply_norm(case, block.attention_norm, between)
    return before, between, apply_norm(case, block.mlp_norm, between + mlp)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_readers_see_the_stream_and_writers_add_to_it(name: str) -> None:
    c = case(name)
    for block in c.anatomy.blocks:
        attention_sees, mlp_sees, output = replay(c, block, c.trace.inputs[block.name])
        for reader in block.attention.readers():
            close(c.trace.rows(reader), attention_sees.flatten(0, -2))
        for reader in block.mlp.readers():
            close(c.trace.rows(reader), mlp_sees.flatten(0, -2))
        close(c.trace.outputs[block.name], output)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_first_stream_is_the_sum_of_the_embeddings(name: str) -> None:
    c, found = case(name), case(name).anatomy
    parameters = dict(c.model.named_parameters())
    if found.kind == "vision":
        tokens, (positions, class_token) = c.trace.outputs[found.writers()[0]], found.writers()[1:]
        patches = tokens.flatten(2).transpose(1, 2)
        first = torch.cat([parameters[class_token].expand(len(patches), -1, -1), patches], 1) + parameters[positions]
    else:
        first = torch.stack([c.trace.outputs[w].expand(2, -1, -1) for w in found.writers()]).sum(0)
    close(c.trace.inputs[found.blocks[0].name], apply_norm(c, found.embedding_norm, first))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "vit"])
@torch.no_grad()
def test_the_token_embedding_carries_its_scale(name: str) -> None:
    c, table = case(name), case(name).anatomy.token_embedding
    rows = c.module(table).weight[c.trace.inputs[table]]
    close(c.trace.outputs[table], rows * c.anatomy.embedding_scale)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_final_readers_see_the_last_stream(name: str) -> None:
    c = case(name)
    last = apply_norm(c, c.anatomy.final_norm, c.trace.outputs[c.anatomy.blocks[-1].name])
    assert c.anatomy.readers()
    for reader in c.anatomy.readers():
        seen = c.trace.inputs[reader]
        close(seen, last[:, 0] if seen.ndim == 2 else last)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_mlp_is_what_it_says(name: str) -> None:
    c = case(name)
    for block in c.anatomy.blocks:
        mlp, outputs = block.mlp, c.trace.outputs
        hidden = outputs[mlp.up.module][..., mlp.up.index()]
        activation = ACT2FN[mlp.activation]
        hidden = (
            activation(outputs[mlp.gate.module][..., mlp.gate.index()]) * hidden if mlp.gate else activation(hidden)
        )
        close(c.trace.rows(mlp.down.module), hidden.flatten(0, -2))
        assert mlp.down.shape == (c.anatomy.width, mlp.up.shape[0])
        assert mlp.name in (block.name, f"{block.name}.mlp")
