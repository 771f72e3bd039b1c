"""What anatomy finds in every family, on the meta device and for real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from anatomy_zoo import CONFIGS, DEPTH, GATED, GPT2, HEADS, OPT, WIDTH, build, case, config
from peft import LoraConfig, get_peft_model
from torch import nn

from eckart.anatomy import FAMILIES, Anatomy, Rotary, Rows, anatomy, features, linears


@pytest.mark.parametrize("name", CONFIGS)
def test_the_meta_device_gives_the_same_anatomy(name: str) -> None:
    assert anatomy(build(name, "meta")) == case(name).anatomy


@pytest.mark.parametrize("name", CONFIGS)
def test_every_linear_module_has_its_place(name: str) -> None:
    found = case(name).anatomy
    assert found.unplaced == ()
    assert found.width == WIDTH
    assert [block.name for block in found.blocks] == [f"{found.block_list}.{i}" for i in range(DEPTH)]
    inside = {s.name: s.block for s in linears(case(name).model) if s.block is not None}
    for i, block in enumerate(found.blocks):
        assert {*block.readers(), *block.writers()} == {n for n, index in inside.items() if index == i}


BARE_READERS = {
    "bert": ("pooler.dense",),
    "mpnet": ("pooler.dense",),
    "vit": ("pooler.dense",),
    "opt-post-norm": ("decoder.project_out",),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bare_model_has_the_same_blocks_and_no_head(name: str) -> None:
    bare, headed = anatomy(build(name, "meta", tf.AutoModel)), case(name).anatomy
    assert bare.head is None
    assert not bare.tied
    assert bare.unplaced == ()
    assert len(bare.blocks) == len(headed.blocks)
    assert [b.attention.scale for b in bare.blocks] == [b.attention.scale for b in headed.blocks]
    assert headed.block_list.endswith(bare.block_list)
    assert headed.base.endswith(bare.base)
    assert bare.readers() == BARE_READERS.get(name, ())


HEADS_OF = {
    "llama": (2, 8, Rotary(8)),
    "llama-tied-mha": (4, 8, Rotary(8)),
    "mistral": (2, 8, Rotary(8)),
    "qwen2": (2, 8, Rotary(8)),
    "qwen3": (2, 16, Rotary(16)),
    "gemma": (1, 16, Rotary(16)),
    "gemma2": (1, 16, Rotary(16)),
    "gemma3": (1, 16, Rotary(16)),
    "gpt_neox": (4, 8, Rotary(4)),
    "gpt_neox-sequential": (4, 8, Rotary(2)),
    "phi": (4, 8, Rotary(4)),
    "phi-gqa-qk-norm": (2, 8, Rotary(4)),
    "phi3": (2, 8, Rotary(8)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_head_layout(name: str) -> None:
    kv_heads, head_dim, rotary = HEADS_OF.get(name, (4, 8, None))
    for block in case(name).anatomy.blocks:
        a = block.attention
        assert (a.heads, a.kv_heads, a.head_dim, a.rotary) == (HEADS, kv_heads, head_dim, rotary)
        assert a.group == HEADS // kv_heads
        assert a.q.shape == (HEADS * head_dim, WIDTH)
        assert a.k.shape == a.v.shape == (kv_heads * head_dim, WIDTH)
        assert a.o.shape == (WIDTH, HEADS * head_dim)
        assert len(a.q.index()) == a.q.shape[0]


def test_rotary_pairs() -> None:
    assert Rotary(6).pairs() == ((0, 3), (1, 4), (2, 5))


def test_rows_index_runs_in_order() -> None:
    assert Rows(1, 2, 5, 3).index().tolist() == [1, 2, 6, 7, 11, 12]
    assert len(Rows(1, 2, 5, 3)) == 6
    assert Rows(4, 3).index().tolist() == [4, 5, 6]


def test_fused_projections_split_their_module_without_overlap() -> None:
    for name in ("gpt2", "gpt_neox", "phi3"):
        a = case(name).anatomy.blocks[1].attention
        assert a.q.module == a.k.module == a.v.module
        rows = torch.cat([a.q.index(), a.k.index(), a.v.index()])
        assert rows.sort().values.equal(torch.arange(sum(p.shape[0] for p in (a.q, a.k, a.v))))
    assert case("gpt_neox").anatomy.blocks[0].attention.k.rows == Rows(8, 8, 24, 4)
    assert case("phi3").anatomy.blocks[0].mlp.up.rows == Rows(48, 48)


def test_gemma_scales_its_embedding_and_offsets_its_gains() -> None:
    for name in ("gemma", "gemma2", "gemma3"):
        found = case(name).anatomy
        assert found.embedding_scale == WIDTH**0.5
        assert found.final_norm is not None
        assert found.final_norm.gain_offset == 1.0
    assert case("llama").anatomy.embedding_scale == 1.0
    assert case("llama").anatomy.blocks[0].attention_norm.gain_offset == 0.0


def test_which_families_norm_what() -> None:
    phi, gemma3, bert = (case(n).anatomy.blocks[0] for n in ("phi", "gemma3", "bert"))
    assert phi.parallel
    assert phi.attention_norm == phi.mlp_norm
    assert gemma3.post_attention_norm is not None
    assert gemma3.post_mlp_norm is not None
    assert gemma3.attention.qk_norm == ("model.layers.0.self_attn.q_norm", "model.layers.0.self_attn.k_norm")
    assert not bert.pre_norm
    assert case("bert").anatomy.final_norm is None
    assert case("gpt_neox").anatomy.blocks[0].parallel
    assert not case("gpt_neox-sequential").anatomy.blocks[0].parallel
    assert {case(n).anatomy.blocks[0].attention_norm.kind for n in ("opt", "gpt2", "vit", "phi")} == {"layer"}
    assert {case(n).anatomy.blocks[0].attention_norm.kind for n in ("llama", "qwen3", "gemma")} == {"rms"}


TIED = {"llama-tied-mha", "gemma", "gemma2", "gemma3", "opt", "opt-post-norm", "opt-no-affine", "gpt2", "bert", "mpnet"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tied_heads(name: str, device: str) -> None:
    found = case(name).anatomy if device == "cpu" else anatomy(build(name, "meta"))
    assert found.tied == (name in TIED)


def test_stream_ends_of_opt_with_a_narrow_embedding() -> None:
    found = case("opt-post-norm").anatomy
    assert found.writers() == ("model.decoder.project_in", "model.decoder.embed_positions")
    assert found.readers() == ("model.decoder.project_out",)
    assert found.head == "lm_head"
    assert found.final_norm is None


@pytest.mark.parametrize(
    ("cls", "settings", "head", "readers", "unplaced"),
    [
        (tf.BertForSequenceClassification, GATED, "classifier", ("bert.pooler.dense",), ()),
        (tf.BertForTokenClassification, GATED, "classifier", ("classifier",), ()),
        (tf.BertForQuestionAnswering, GATED, "qa_outputs", ("qa_outputs",), ()),
        (
            tf.BertForPreTraining,
            GATED,
            "cls.predictions.decoder",
            ("bert.pooler.dense", "cls.predictions.transform.dense"),
            ("cls.seq_relationship",),
        ),
        (tf.MPNetForSequenceClassification, GATED, "classifier.out_proj", ("classifier.dense",), ()),
        (tf.ViTForMaskedImageModeling, {**GATED, "encoder_stride": 16}, "decoder.0", ("decoder.0",), ()),
        (tf.LlamaForSequenceClassification, GATED, "score", ("score",), ()),
        (tf.LlamaForQuestionAnswering, GATED, "qa_outputs", ("qa_outputs",), ()),
        (tf.OPTForSequenceClassification, OPT, "score", ("score",), ()),
        (tf.GPT2ForTokenClassification, GPT2, "classifier", ("classifier",), ()),
        (tf.GPT2DoubleHeadsModel, GPT2, "lm_head", ("lm_head",), ("multiple_choice_head.summary",)),
    ],
)
def test_heads(
    cls: Any, settings: dict[str, Any], head: str, readers: tuple[str, ...], unplaced: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        found = anatomy(cls(cls.config_class(**settings)))
    assert (found.head, found.readers(), found.unplaced) == (head, readers, unplaced)


def test_cross_attention_is_reported_as_unplaced() -> None:
    with torch.device("meta"):
        found = anatomy(tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, add_cross_attention=True)))
    assert "transformer.h.1.crossattention.q_attn" in found.unplaced
    assert len(found.unplaced) == 3 * DEPTH


def test_the_text_model_inside_a_multimodal_one() -> None:
    settings = {**GATED, "head_dim": 8}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    with torch.device("meta"):
        model = tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=settings, vision_config=vision))
    found = anatomy(model)
    assert (found.model_type, found.base, found.head) == ("gemma3_text", "model.language_model", "lm_head")
    assert any(name.startswith("model.vision_tower") for name in found.unplaced)
    assert not any(name.startswith(found.base) for name in found.unplaced)


class Replaced(nn.Module):
    """A compressed projection: states its sizes, hides two linear factors."""

    def __init__(self, whole: nn.Module) -> None:
        super().__init__()
        self.out_features, self.in_features = features(whole) or (0, 0)
        self.factors = nn.Sequential(nn.Linear(self.in_features, 3), nn.Linear(3, self.out_features))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_compressed_model_keeps_its_anatomy(name: str) -> None:
    model, before = build(name), case(name).anatomy
    for block in before.blocks:
        for path in (*block.readers(), *block.writers()):
            model.set_submodule(path, Replaced(model.get_submodule(path)))
    assert anatomy(model) == before


def test_a_head_that_no_longer_shares_its_weight_is_not_tied() -> None:
    model = build("llama-tied-mha")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert anatomy(model) == replace(case("llama-tied-mha").anatomy, tied=False)


def test_a_wrapped_model_has_longer_names() -> None:
    wrapped = nn.ModuleDict({"inner": build("llama")})
    assert anatomy(wrapped).blocks[1].mlp.up.module == "inner.model.layers.1.mlp.up_proj"
    assert anatomy(wrapped).head == "inner.lm_head"


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_adapters_of_peft_are_seen_through(name: str) -> None:
    adapted = get_peft_model(build(name), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    found = anatomy(adapted)
    assert found.unplaced == ()
    assert found.blocks[0].attention.q.shape == case(name).anatomy.blocks[0].attention.q.shape
    assert found.head == "base_model.model.lm_head"


def test_a_shared_block_counts_as_often_as_it_runs() -> None:
    model = build("llama", auto=tf.AutoModel)
    model.layers = nn.ModuleList([model.layers[0]] * 3)
    assert [b.name for b in anatomy(model).blocks] == ["layers.0", "layers.1", "layers.2"]


def test_an_anatomy_is_hashable_and_frozen() -> None:
    found: Anatomy = case("gpt_neox").anatomy
    assert hash(found) == hash(anatomy(build("gpt_neox")))
    with pytest.raises(AttributeError):
        found.width = 3  # type: ignore[misc]


def test_every_family_is_tested() -> None:
    assert {config(name).model_type for name in CONFIGS} == set(FAMILIES)
