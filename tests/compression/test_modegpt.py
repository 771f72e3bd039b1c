"""MoDeGPT: what its card says, on tiny random models of every family."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

import eckart
from eckart.allocation import Budget, BudgetError
from eckart.allocation.entropy import sparsities
from eckart.anatomy import Attention, Block, UnknownModel, anatomy
from eckart.calibration.subject import InMemory
from eckart.compression.modegpt import MoDeGPT
from eckart.compression.narrowing import Widths
from eckart.forms import parse
from eckart.forms.layers import matrix_of
from eckart.jobs.engine import Engine
from eckart.jobs.plan import Plan

VOCABULARY = 40
CORE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = {**CORE, "intermediate_size": 48}
GQA = {**GATED, "num_key_value_heads": 2}
HALF_ROTARY = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
GEMMA = {**GATED, "num_key_value_heads": 1, "head_dim": 16}
CONFIGS: dict[str, tuple[type[tf.PreTrainedConfig], dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {**GQA, "attention_bias": True, "mlp_bias": True}),
    "qwen2": (tf.Qwen2Config, GQA),
    "qwen3": (tf.Qwen3Config, {**GQA, "head_dim": 16}),
    "gemma": (tf.GemmaConfig, GEMMA),
    "gemma2": (tf.Gemma2Config, {**GEMMA, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}),
    "opt": (tf.OPTConfig, {**CORE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": (tf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32,
                             "bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neox": (tf.GPTNeoXConfig, {**GATED, "rope_parameters": HALF_ROTARY}),
    "phi": (tf.PhiConfig, GATED),
    "phi3": (tf.Phi3Config, GQA),
    "bert": (tf.BertConfig, GATED),
}  # fmt: skip
GENERATORS = ["llama", "qwen2", "gemma", "opt", "gpt2", "gpt_neox", "phi", "phi3"]


def build(name: str, **changes: Any) -> Any:
    cls, settings = CONFIGS[name]
    auto = tf.AutoModelForMaskedLM if name == "bert" else tf.AutoModelForCausalLM
    model = auto.from_config(cls(**{**settings, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.25, generator=generator)
    return model


def batches(count: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, VOCABULARY, (4, 16), generator=generator)} for _ in range(count)]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**batches(1)[0]).logits


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def engine(model: nn.Module, method: MoDeGPT, folder: Path, budget: float = 1.0) -> Engine:
    return Engine(InMemory(model), method, Budget.parse(budget), batches(), folder)


def cut(model: nn.Module, folder: Path, keep: Any, **settings: Any) -> Any:
    """The layers after every block was cut to `keep(block)`."""
    method = MoDeGPT(**{"multiple": 1, **settings})
    job = engine(model, method, folder)
    job.plan()
    widths = [keep(block) for block in anatomy(model).blocks]
    return {layer.name: layer for layer in job.fit(method.plan_widths(job.job, widths, 0)).layers}


def all_of(block: Block) -> Widths:
    a = block.attention
    return Widths(block.mlp.down.shape[1], None if a.qk_norm else a.head_dim, a.head_dim)


def some_of(block: Block) -> Widths:
    a = block.attention
    return Widths(30, None if a.qk_norm else 4, 5)


class Seen:
    """Rows that enter and leave the modules of a model on the calibration data, in float64."""

    def __init__(self, model: nn.Module):
        self.inputs: dict[str, list[Tensor]] = {}
        self.outputs: dict[str, list[Tensor]] = {}
        handles = [m.register_forward_hook(self._keep(n)) for n, m in model.named_modules()]
        with torch.no_grad():
            for batch in batches():
                model(**batch)
        for handle in handles:
            handle.remove()

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and args[0].is_floating_point() and isinstance(output, Tensor):
                self.inputs.setdefault(name, []).append(args[0].flatten(0, -2).double())
                self.outputs.setdefault(name, []).append(output.flatten(0, -2).double())

        return hook

    def x(self, name: str) -> Float[Tensor, "rows in"]:
        return torch.cat(self.inputs[name])

    def y(self, name: str) -> Float[Tensor, "rows out"]:
        return torch.cat(self.outputs[name])


def places(model: Any, a: Attention, which: str) -> list[list[int]]:
    """The coordinates of each head that a compressed projection keeps."""
    p = getattr(a, which)
    stored = set(model.get_submodule(p.module).matrix.left.index.tolist())
    heads = p.index().view(-1, a.head_dim).tolist()
    return [[i for i, row in enumerate(head) if row in stored] for head in heads]


@pytest.mark.parametrize("name", CONFIGS)
def test_all_coordinates_reproduce_the_logits(name: str, tmp_path: Path) -> None:
    model = build(name)
    before = logits(model)
    layers = cut(model, tmp_path, all_of)
    changed = {n for n, layer in layers.items() if layer.form != "dense()"}
    kept_dense = {n for n in layers if n not in changed}
    assert all(n.endswith(("q_proj", "k_proj")) for n in kept_dense)
    assert bool(kept_dense) == (name == "qwen3")
    assert relative(logits(model), before) < 1e-4


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "qwen3"])
def test_kept_coordinates_are_shared_by_a_group_and_split_no_rotary_pair(name: str, tmp_path: Path) -> None:
    model = build(name)
    cut(model, tmp_path, some_of)
    for block in anatomy(model).blocks:
        a = block.attention
        q, k, v = (places(model, a, which) for which in "qkv")
        assert [len(head) for head in (*q, *k)] == [4] * (a.heads + a.kv_heads)
        assert q == [k[h // a.group] for h in range(a.heads)]
        assert v == [list(range(5))] * a.kv_heads
        for i, j in a.rotary.pairs() if a.rotary else ():
            assert all((i in head) == (j in head) for head in k)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_kept_coordinates_are_those_of_the_largest_measured_scores(name: str, tmp_path: Path) -> None:
    """E[q_i²] E[k_i²] from what the projections really put out, biases and all, against W C Wᵀ and the mean."""
    model = build(name)
    seen = Seen(model)
    blocks = anatomy(model).blocks
    layers = cut(model, tmp_path, some_of)
    for block in blocks:
        a = block.attention
        q, k = (
            seen.y(p.module)[:, p.index()].square().mean(0).view(a.kv_heads, -1, a.head_dim) for p in (a.q, a.k)
        )  # fmt: skip
        scores = (q * k).sum(1)
        for chosen, row in zip(places(model, a, "k"), scores, strict=True):
            units = [list(pair) for pair in (a.rotary.pairs() if a.rotary else ())]
            units += [[i] for i in range(a.head_dim) if not any(i in unit for unit in units)]
            outside = [unit for unit in units if unit[0] not in chosen]
            for size in (1, 2):
                inside = [float(row[u].sum()) for u in units if u[0] in chosen and len(u) == size]
                left = [float(row[u].sum()) for u in outside if len(u) == size]
                assert not inside or not left or min(inside) >= max(left) * (1 - 1e-5)
        layer = layers[a.q.module]
        dropped = sum(float(r.sum() - r[c].sum()) for c, r in zip(places(model, a, "k"), scores, strict=True))
        assert layer.predicted_error == pytest.approx(dropped, rel=1e-4)
        assert layer.energy == pytest.approx(float(scores.sum()), rel=1e-4)


def matrix(model: Any, name: str) -> Float[Tensor, "out in"]:
    return matrix_of(model.get_submodule(name)).detach().double()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
def test_down_projection_is_least_squares_on_the_kept_activations(name: str, tmp_path: Path) -> None:
    source = build(name)
    seen, model = Seen(source), copy.deepcopy(source)
    blocks = anatomy(source).blocks
    layers = cut(model, tmp_path, lambda block: Widths(20, None, None))
    for block in blocks:
        W, a = matrix(source, block.mlp.down.module), seen.x(block.mlp.down.module)
        rows = matrix(source, block.mlp.up.module)[block.mlp.up.index()]
        kept = matrix(model, block.mlp.up.module)[-20:]  # a fused gate comes first
        index = (rows[:, None] == kept).all(-1).any(1).nonzero()[:, 0]
        assert len(index) == 20
        y, a = a @ W.T, a[:, index]
        error = float((y - a @ matrix(model, block.mlp.down.module).T).square().sum()) / len(a)
        best = float((y - a @ torch.linalg.lstsq(a, y).solution).square().sum()) / len(a)
        unchanged = float((y - a @ W[:, index].T).square().sum()) / len(a)
        assert best * (1 - 1e-6) <= error <= best * (1 + 1e-4) < unchanged
        layer = layers[block.mlp.down.module]
        assert layer.measured_error == pytest.approx(error, rel=1e-4)
        assert layer.predicted_error == pytest.approx(error, rel=1e-4)
        assert layer.energy == pytest.approx(float(y.square().sum()) / len(a), rel=1e-4)


def products_of_heads(model: Any, a: Attention) -> Float[Tensor, "kv_heads width m"]:
    """W_vᵀ W_oᵀ of every group, its query heads side by side."""
    V = matrix(model, a.v.module)[a.v.index()].view(a.kv_heads, a.head_dim, -1)
    O = matrix(model, a.o.module).view(-1, a.heads, a.head_dim)
    groups = [range(g * a.group, (g + 1) * a.group) for g in range(a.kv_heads)]
    return torch.stack([torch.cat([V[g].T @ O[:, h].T for h in heads], 1) for g, heads in enumerate(groups)])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3"])
def test_values_and_output_lose_the_discarded_singular_values(name: str, tmp_path: Path) -> None:
    source = build(name)
    seen, model = Seen(source), copy.deepcopy(source)
    layers = cut(model, tmp_path, lambda block: Widths(None, None, 5), damping=0.0)
    for block in anatomy(source).blocks:
        a = block.attention
        x = seen.x(a.q.module)
        discarded = error = 0.0
        old, new = (products_of_heads(m, a) for m in (source, model))
        for before, after in zip(old, new, strict=True):
            discarded += float(torch.linalg.svdvals(x @ before)[5:].square().sum()) / len(x)
            error += float((x @ (before - after)).square().sum()) / len(x)
        assert error == pytest.approx(discarded, rel=1e-4)
        assert layers[a.o.module].predicted_error == pytest.approx(discarded, rel=1e-4)
        assert layers[a.o.module].measured_error == pytest.approx(error, rel=1e-4)


def test_bias_of_the_values_moves_into_the_output(tmp_path: Path) -> None:
    model = build("qwen2")
    assert model.model.layers[0].self_attn.o_proj.bias is None
    cut(model, tmp_path, lambda block: Widths(None, None, 8))
    attention = model.model.layers[0].self_attn
    assert attention.v_proj.bias is None
    assert float(attention.o_proj.bias.abs().sum()) > 0


def test_dropped_rows_have_no_bias(tmp_path: Path) -> None:
    model = build("gpt2")
    cut(model, tmp_path, some_of)
    attention = model.transformer.h[0].attn.c_attn
    zero = attention.weight.abs().sum(0) == 0
    assert int(zero.sum()) == 96 - 4 * (4 + 4 + 5)
    assert bool((attention.bias[zero] == 0).all())
    assert int((attention.bias != 0).sum()) == 4 * (4 + 4)


def test_heads_with_a_norm_keep_their_queries_and_keys_and_say_so() -> None:
    model = build("qwen3")
    result = eckart.compress(model, "modegpt", budget=0.8, data=batches(), multiple=4).result
    for layer in result.layers:
        if layer.name.endswith(("q_proj", "k_proj")):
            assert (layer.form, layer.bytes) == ("dense()", layer.dense_bytes)
            assert "norm of whole heads" in str(layer.note)
    assert any(layer.name.endswith("v_proj") and layer.form != "dense()" for layer in result.layers)


def test_sparsities_meet_their_mean_stay_below_the_cap_and_follow_influence() -> None:
    influence = [0.9, 0.3, 0.1, 0.05, 0.4]
    for temperature in (0.1, 0.3, 3.0):
        phi = sparsities(influence, 0.4, temperature, 0.8)
        assert sum(phi) / 5 == pytest.approx(0.4, abs=1e-6)
        assert max(phi) <= 0.8 + 1e-12
        assert [phi[i] for i in sorted(range(5), key=lambda i: influence[i])] == sorted(phi, reverse=True)
    spread = [max(p) - min(p) for p in (sparsities(influence, 0.2, t, 0.8) for t in (0.1, 0.3, 3.0))]
    assert spread[0] > spread[1] > spread[2]


def test_blocks_of_less_influence_lose_more(tmp_path: Path) -> None:
    model = build("llama")
    job = engine(model, MoDeGPT(multiple=1, temperature=0.3), tmp_path, 0.75)
    plan = job.plan()
    order = sorted(range(2), key=lambda i: job.job.influence[i])
    first, second = (plan.extra["widths"][i][0] or 48 for i in order)
    assert first < second


@pytest.mark.parametrize("name", GENERATORS)
def test_saved_model_loads_and_generates(name: str, tmp_path: Path) -> None:
    model = build(name)
    result = eckart.compress(model, "modegpt", budget=0.75, data=batches(), multiple=4).result
    assert any(layer.form != "dense()" for layer in result.layers)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    prompt = batches(1)[0]["input_ids"][:, :5]
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = loaded.generate(prompt, use_cache=True, **settings)
    assert torch.equal(cached, loaded.generate(prompt, use_cache=False, **settings))
    assert cached.shape == (4, 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_files(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build("llama").to(dtype)
    model.save_pretrained(tmp_path / "source")
    settings: dict[str, Any] = {"budget": 0.75, "data": batches(), "multiple": 4}
    planned = eckart.compress_to(tmp_path / "planned", tmp_path / "source", "modegpt", dry_run=True, **settings)
    result = eckart.compress_to(tmp_path / "out", tmp_path / "source", "modegpt", **settings)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert sum(f.stat().st_size for f in files) == planned.bytes_after <= result.budget
    assert planned.bytes_after > 0.9 * result.budget
    stored = {k: v for f in files for k, v in load_file(f).items()}
    for layer in result.layers:
        own = [v for k, v in stored.items() if k.startswith(layer.name + ".")]
        assert layer.bytes == sum(v.numel() * v.element_size() for v in own)
        assert layer.dense_bytes == (layer.shape[0] * layer.shape[1] + layer.shape[0]) * dtype.itemsize
        assert str(parse(layer.form)) == layer.form
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    if dtype == torch.float32:
        eckart.compress(model, "modegpt", **settings)
        assert relative(logits(loaded), logits(model)) < 1e-5


def test_a_plan_that_went_through_json_gives_the_same_model(tmp_path: Path) -> None:
    model = build("llama")
    twin = copy.deepcopy(model)
    for m, folder in ((model, tmp_path / "a"), (twin, tmp_path / "b")):
        job = engine(m, MoDeGPT(multiple=1), folder, 0.7)
        plan = job.plan()
        job.fit(plan if m is model else Plan.from_json(json.loads(json.dumps(plan.to_json()))))
    assert torch.equal(logits(model), logits(twin))


def test_nothing_is_changed_where_the_budget_allows_all() -> None:
    model = build("llama")
    before = logits(model)
    result = eckart.compress(model, "modegpt", budget=1.0, data=batches()).result
    assert {layer.form for layer in result.layers} == {"dense()"}
    assert {layer.note for layer in result.layers} == {"left dense: its share keeps every unit"}
    assert torch.equal(logits(model), before)


def test_too_little_data_still_gives_finite_weights() -> None:
    model = build("llama")
    data = [{"input_ids": torch.arange(3, 9)[None]}]
    eckart.compress(model, "modegpt", budget=0.75, data=data, multiple=4)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_impossible_budget_states_the_smallest() -> None:
    model = build("llama")
    before = logits(model)
    with pytest.raises(BudgetError, match=r"the smallest possible is (\d+) bytes \(0\.\d+ of the input\)") as error:
        eckart.compress(model, "modegpt", budget=0.1, data=batches(), multiple=4)
    assert torch.equal(logits(model), before)
    smallest = int(str(error.value).split("possible is ")[1].split()[0])
    result = eckart.compress(model, "modegpt", budget=f"{smallest}B", data=batches(), multiple=4).result
    assert result.bytes_after == smallest


def test_bad_input_is_named() -> None:
    for settings in (
        {"cap": 1.0},
        {"cap": 0.0},
        {"temperature": 0.0},
        {"ridge": 0.0},
        {"damping": -1.0},
        {"multiple": 0},
    ):
        with pytest.raises(ValueError, match="modegpt needs"):
            MoDeGPT(**settings)
    with pytest.raises(ValueError, match="modegpt needs calibration data"):
        eckart.compress(build("llama"), "modegpt", budget=0.8)
    with pytest.raises(UnknownModel, match="Sequential has no config"):
        eckart.compress(nn.Sequential(nn.Linear(3, 3)), "modegpt", budget=0.8, data=batches())
    with pytest.raises(ValueError, match="4 query heads do not share 3 key heads evenly"):
        eckart.compress(build("llama", num_key_value_heads=3), "modegpt", budget=0.8, data=batches())
    model = build("llama")
    eckart.compress(model, "svd", budget=0.8)
    with pytest.raises(ValueError, match=r"q_proj \(FactoredLinear\) is compressed or quantised already"):
        eckart.compress(model, "modegpt", budget=0.8, data=batches())


def test_better_than_removing_small_channels_of_a_trained_model(tmp_path: Path) -> None:
    """At equal widths, on text of a Markov chain that a small GPT-2 has learnt."""
    generator = torch.Generator().manual_seed(0)
    chain = (3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)).softmax(-1)

    def text(rows: int, length: int = 24) -> Tensor:
        ids = [torch.randint(VOCABULARY, (rows,), generator=generator)]
        while len(ids) < length:
            ids.append(torch.multinomial(chain[ids[-1]], 1, generator=generator)[:, 0])
        return torch.stack(ids, 1)

    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(
        tf.GPT2Config(**CONFIGS["gpt2"][1], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        ids = text(16)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    held_out, twin = text(64), copy.deepcopy(model)
    whole = float(model(input_ids=held_out, labels=held_out).loss)

    def lost(m: Any) -> float:
        return float(m(input_ids=held_out, labels=held_out).loss) - whole

    kept = 16  # of 128
    for block in twin.transformer.h:
        up, down = block.mlp.c_fc, block.mlp.c_proj
        size = up.weight.norm(dim=0) * down.weight.norm(dim=1)
        gone = size.argsort()[:-kept]
        up.weight[:, gone] = up.bias[gone] = 0
        down.weight[gone] = 0
    method = MoDeGPT()
    job = Engine(InMemory(model), method, Budget.parse(1.0), [{"input_ids": text(32)}], tmp_path)
    job.plan()
    job.fit(method.plan_widths(job.job, [Widths(kept, None, None)] * 2, 0))
    assert 0 < lost(model) < 0.7 * lost(twin)
