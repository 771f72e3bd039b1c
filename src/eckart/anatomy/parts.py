"""The parts of a transformer, as frozen records of dotted module names and sizes.

Every name is a path from the model that was given to `anatomy`; `model.get_submodule(name)` returns the module.
The residual stream is the sum that runs through the blocks: *writers* add to it, *readers* take it as input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor


def unique(*names: str | None) -> tuple[str, ...]:
    """The names in order, each once, without the missing ones."""
    return tuple(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True)
class Rows:
    """Some output rows of a module: `count` runs of `length` rows, `step` apart, the first beginning at `start`."""

    start: int
    length: int
    step: int = 0
    count: int = 1

    def __len__(self) -> int:
        return self.length * self.count

    def index(self) -> Int[Tensor, " rows"]:
        """The row numbers, run after run."""
        runs = self.start + self.step * torch.arange(self.count, device="cpu")
        return (runs[:, None] + torch.arange(self.length, device="cpu")).flatten()


@dataclass(frozen=True)
class Projection:
    """One logical matrix (out, in): a whole module, or some rows of a fused one.

    Attributes:
        module: the module that holds it.
        shape: (out, in) of the logical matrix, whatever the module's own layout.
        rows: the module's output features that belong to it, in the order of the logical matrix; None is all of them.
    """

    module: str
    shape: tuple[int, int]
    rows: Rows | None = None

    def index(self) -> Int[Tensor, " out"]:
        """The module's output features that are this matrix's rows. Rows of one head are consecutive."""
        return (self.rows or Rows(0, self.shape[0])).index()


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of the first `dim` coordinates of each query and key head; the rest pass unchanged.

    The convention is that of transformers' `rotate_half`: coordinate i turns with i + dim/2.
    """

    dim: int

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """The coordinates (within a head) that turn together; pair f turns with frequency f."""
        half = self.dim // 2
        return tuple((i, i + half) for i in range(half))


@dataclass(frozen=True)
class Attention:
    """Self-attention: softmax(scale * q k^T) v, then o. Rows of q, k, v and columns of o are grouped by head.

    Attributes:
        name: the module that computes the scores (what transformers hands to its attention function).
        q: (heads * head_dim, width).
        k, v: (kv_heads * head_dim, width); query head h reads key head h // group.
        o: (width, heads * head_dim).
        rotary: None where positions are not rotary.
        qk_norm: norms over each head's queries and keys, before the rotation; empty where there are none.
        scale: the factor of q k^T for q as its projection gives it.
    """

    name: str
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    heads: int
    kv_heads: int
    head_dim: int
    rotary: Rotary | None
    qk_norm: tuple[str, ...]
    scale: float

    @property
    def group(self) -> int:
        """How many query heads share one key and value head."""
        return self.heads // self.kv_heads

    def readers(self) -> tuple[str, ...]:
        return unique(self.q.module, self.k.module, self.v.module)

    def writers(self) -> tuple[str, ...]:
        return (self.o.module,)


@dataclass(frozen=True)
class MLP:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate.

    Attributes:
        name: the module around it; the block itself where the matrices hang directly from the block.
        activation: its name in transformers' `ACT2FN`.
    """

    name: str
    gate: Projection | None
    up: Projection
    down: Projection
    activation: str

    def readers(self) -> tuple[str, ...]:
        return unique(self.gate.module if self.gate else None, self.up.module)

    def writers(self) -> tuple[str, ...]:
        return (self.down.module,)


@dataclass(frozen=True)
class Norm:
    """x / rms(x) * (gain_offset + weight), of x - mean(x) and with a bias if the kind is "layer"."""

    name: str
    kind: Literal["rms", "layer"]
    eps: float
    gain_offset: float


@dataclass(frozen=True)
class Block:
    """One transformer block.

    Attributes:
        attention_norm: before attention if `pre_norm`; else after the sum of the stream and attention's output.
        mlp_norm: the same for the MLP; the very same record as `attention_norm` where one norm serves both (Phi).
        post_attention_norm, post_mlp_norm: norms of a writer's output before it is added to the stream (Gemma 2, 3).
        parallel: attention and MLP both read the block's input; else the MLP reads the stream after attention.
    """

    name: str
    attention: Attention
    mlp: MLP
    attention_norm: Norm
    mlp_norm: Norm
    post_attention_norm: Norm | None
    post_mlp_norm: Norm | None
    pre_norm: bool
    parallel: bool

    def readers(self) -> tuple[str, ...]:
        """Modules whose input is the residual stream (normed, if `pre_norm`)."""
        return self.attention.readers() + self.mlp.readers()

    def writers(self) -> tuple[str, ...]:
        """Modules whose output is added to the residual stream (through the post norms, where there are any)."""
        return self.attention.writers() + self.mlp.writers()


@dataclass(frozen=True)
class Anatomy:
    """A whole model.

    Attributes:
        width: of the residual stream.
        base: the module whose forward runs the blocks ("" if it is the model itself).
        block_list: the ModuleList of the blocks.
        token_embedding: the token table, or a vision model's patch projection.
        position_embedding: learned positions that are added to the stream: a module, or in ViT a bare parameter.
        position_bias: relative positions that are added to the attention scores, not to the stream (MPNet).
        other_embeddings: what else is added to the first stream: token types; ViT's class and mask tokens (parameters).
        embedding_projection: a matrix between the token table and the stream (OPT's `project_in`).
        embedding_norm: norm of the summed embeddings, before the first block.
        embedding_scale: the factor that the token table's output carries (Gemma: sqrt(width)).
        final_norm: after the last block; None in post-norm models.
        final_readers: the modules that take the last stream (normed): the head, or what stands before it.
        head: the last linear module, to tokens or classes; None for a bare model.
        tied: whether head and token table share their weight.
        unplaced: linear modules that no other field accounts for (cross-attention, other towers, second heads). A
            method that changes the basis of the stream must refuse the model unless this is empty.
    """

    model_type: str
    kind: Literal["decoder", "encoder", "vision"]
    width: int
    base: str
    block_list: str
    blocks: tuple[Block, ...]
    token_embedding: str
    position_embedding: str | None
    position_bias: str | None
    other_embeddings: tuple[str, ...]
    embedding_projection: str | None
    embedding_norm: Norm | None
    embedding_scale: float
    final_norm: Norm | None
    final_readers: tuple[str, ...]
    head: str | None
    tied: bool
    unplaced: tuple[str, ...]

    def writers(self) -> tuple[str, ...]:
        """Modules and parameters that are summed into the stream before the first block."""
        return unique(
            self.embedding_projection or self.token_embedding, self.position_embedding, *self.other_embeddings
        )

    def readers(self) -> tuple[str, ...]:
        """Modules that read the stream after the last block."""
        return self.final_readers
