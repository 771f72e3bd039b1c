"""The families of models that anatomy knows: the names of their parts, as data.

To teach anatomy a new model type, add an entry to `FAMILIES`, usually a `replace` of a similar family. Sizes are not
written here: they are read from the modules and the config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Where the parts of one family are.

    The fields from `attention` to `post_mlp_norm` are paths below one block ("" is the block itself), the paths after
    them start at the base model, the module that runs the blocks. A model may lack a part whose default here is empty.

    `head` and `final_readers` are candidates, looked for in the base and then in the modules around it. The first head
    that is linear is taken, and every final reader; where there is none of these, the head is the final reader.
    Where query, key and value are one module, `fused` says whether its rows are all queries, then all keys, then all
    values ("stacked"), or the three of each head in turn ("per_head"). Where gate and up are one module, the gate comes
    first. `activation` names a config attribute, and so does a string in `parallel` or `pre_norm`.
    """

    kind: Literal["decoder", "encoder", "vision"]
    blocks: str
    token_embedding: str
    attention: str
    query: str
    key: str
    value: str
    out: str
    mlp: str
    up: str
    down: str
    attention_norm: str
    mlp_norm: str
    gate: str | None = None
    fused: Literal["stacked", "per_head"] = "stacked"
    qk_norm: tuple[str, ...] = ()
    post_attention_norm: str | None = None
    post_mlp_norm: str | None = None
    position_embedding: str | None = None
    position_bias: str | None = None
    other_embeddings: tuple[str, ...] = ()
    embedding_projection: str | None = None
    embedding_norm: str | None = None
    final_norm: str | None = None
    rotary: str | None = None
    head: tuple[str, ...] = ("lm_head", "score", "classifier", "qa_outputs")
    final_readers: tuple[str, ...] = ()
    activation: str = "hidden_act"
    gain_offset: float = 0.0
    scaled_embedding: bool = False
    parallel: bool | str = False
    pre_norm: bool | str = True


LLAMA = Family(
    kind="decoder",
    blocks="layers",
    token_embedding="embed_tokens",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    qk_norm=("self_attn.q_norm", "self_attn.k_norm"),
    mlp="mlp",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    final_norm="norm",
    rotary="rotary_emb",
)

GEMMA = replace(LLAMA, gain_offset=1.0, scaled_embedding=True)

GEMMA2 = replace(
    GEMMA,
    mlp_norm="pre_feedforward_layernorm",
    post_attention_norm="post_attention_layernorm",
    post_mlp_norm="post_feedforward_layernorm",
    activation="hidden_activation",
)

PHI = replace(
    LLAMA,
    out="self_attn.dense",
    qk_norm=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    gate=None,
    up="mlp.fc1",
    down="mlp.fc2",
    mlp_norm="input_layernorm",
    final_norm="final_layernorm",
    parallel=True,
)

PHI3 = replace(
    LLAMA,
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
)

OPT = replace(
    LLAMA,
    out="self_attn.out_proj",
    qk_norm=(),
    mlp="",
    gate=None,
    up="fc1",
    down="fc2",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    position_embedding="embed_positions",
    embedding_projection="project_in",
    final_norm="final_layer_norm",
    final_readers=("project_out",),
    rotary=None,
    activation="activation_function",
    pre_norm="do_layer_norm_before",
)

GPT2 = Family(
    kind="decoder",
    blocks="h",
    token_embedding="wte",
    position_embedding="wpe",
    attention="attn",
    query="attn.c_attn",
    key="attn.c_attn",
    value="attn.c_attn",
    out="attn.c_proj",
    mlp="mlp",
    up="mlp.c_fc",
    down="mlp.c_proj",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    final_norm="ln_f",
    activation="activation_function",
)

GPT_NEOX = Family(
    kind="decoder",
    blocks="layers",
    token_embedding="embed_in",
    attention="attention",
    query="attention.query_key_value",
    key="attention.query_key_value",
    value="attention.query_key_value",
    out="attention.dense",
    fused="per_head",
    mlp="mlp",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    final_norm="final_layer_norm",
    rotary="rotary_emb",
    parallel="use_parallel_residual",
)

BERT = Family(
    kind="encoder",
    blocks="encoder.layer",
    token_embedding="embeddings.word_embeddings",
    position_embedding="embeddings.position_embeddings",
    other_embeddings=("embeddings.token_type_embeddings",),
    embedding_norm="embeddings.LayerNorm",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    mlp="",
    up="intermediate.dense",
    down="output.dense",
    attention_norm="attention.output.LayerNorm",
    mlp_norm="output.LayerNorm",
    head=("cls.predictions.decoder", "cls.seq_relationship", "classifier", "qa_outputs"),
    final_readers=("pooler.dense", "cls.predictions.transform.dense"),
    pre_norm=False,
)

MPNET = replace(
    BERT,
    position_bias="encoder.relative_attention_bias",
    other_embeddings=(),
    attention="attention.attn",
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    out="attention.attn.o",
    attention_norm="attention.LayerNorm",
    head=("lm_head.decoder", "classifier.out_proj", "classifier", "qa_outputs"),
    final_readers=("pooler.dense", "lm_head.dense", "classifier.dense"),
)

VIT = Family(
    kind="vision",
    blocks="layers",
    token_embedding="embeddings.patch_embeddings.projection",
    position_embedding="embeddings.position_embeddings",
    other_embeddings=("embeddings.cls_token", "embeddings.mask_token"),
    attention="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    out="attention.o_proj",
    mlp="mlp",
    up="mlp.fc1",
    down="mlp.fc2",
    attention_norm="layernorm_before",
    mlp_norm="layernorm_after",
    final_norm="layernorm",
    head=("classifier", "decoder.0"),
    final_readers=("pooler.dense",),
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "phi": PHI,
    "phi3": PHI3,
    "opt": OPT,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "bert": BERT,
    "mpnet": MPNET,
    "vit": VIT,
}
