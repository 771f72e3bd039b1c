"""Linformer against exact attention: equal at k = n, masks, cost, sharing, training, checkpoints and refusals."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
import transformers as tf
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import tiny
from eckart.testing import gaussian
from eckart.training import projected_attention, structure, use_linformer
from eckart.training.linformer import SHARES, Linformer, pooling

WIDE = torch.float64


def qkv(n: int, *, heads: int = 2, kv_heads: int | None = None, d: int = 4, m: int | None = None) -> list[Tensor]:
    sizes = ((heads, m or n), (kv_heads or heads, n), (kv_heads or heads, n))
    return [gaussian(3, h, size, d, seed=i, dtype=WIDE) for i, (h, size) in enumerate(sizes)]


def exact(Q: Tensor, K: Tensor, V: Tensor, valid: Tensor | None = None) -> Tensor:
    groups = Q.shape[1] // K.shape[1]
    K, V = K.repeat_interleave(groups, 1), V.repeat_interleave(groups, 1)
    scores = Q @ K.mT / K.shape[-1] ** 0.5
    if valid is not None:
        scores = scores.masked_fill(~valid[..., None, :], -torch.inf)
    return scores.softmax(-1) @ V


def bert(length: int = 12, **settings: Any) -> Any:
    model = tiny.build("bert", num_hidden_layers=2)
    use_linformer(model, length=length, **settings)
    return model


def padded() -> dict[str, Any]:
    return tiny.batches((3,), length=9, padded=True)[0]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("longest", [9, 14])
def test_the_identity_is_exact_attention(kv_heads: int, per_head: bool, masked: bool, longest: int) -> None:
    """With and without a mask, and at sequences below the longest, whose slots beyond are empty."""
    Q, K, V = qkv(9, heads=4, kv_heads=kv_heads, m=5)
    E = torch.eye(longest, dtype=WIDE).repeat(*(kv_heads, 1, 1) if per_head else (1, 1))
    valid = (torch.arange(9) < torch.tensor([[9], [4], [1]]))[:, None] if masked else None
    torch.testing.assert_close(projected_attention(Q, K, V, E, E, valid), exact(Q, K, V, valid), rtol=1e-6, atol=1e-6)


def test_the_formula() -> None:
    """softmax(Q (E K)^T / sqrt(d)) (F V) with E and F of each head."""
    Q, K, V = qkv(10)
    E, F = gaussian(2, 3, 10, seed=7, dtype=WIDE), gaussian(2, 3, 10, seed=8, dtype=WIDE)
    expected = torch.empty(3, 2, 10, 4, dtype=WIDE)
    for b in range(3):
        for h in range(2):
            scores = Q[b, h] @ (E[h] @ K[b, h]).T * 0.3
            expected[b, h] = scores.softmax(-1) @ (F[h] @ V[b, h])
    torch.testing.assert_close(projected_attention(Q, K, V, E, F, scaling=0.3), expected)
    everything = torch.ones(3, 1, 10, dtype=torch.bool)
    torch.testing.assert_close(projected_attention(Q, K, V, E, F, everything, scaling=0.3), expected)


def test_an_empty_slot_takes_no_part_whatever_the_scores_of_the_others() -> None:
    Q, K, V = torch.full((1, 1, 2, 4), 20.0), torch.full((1, 1, 3, 4), -20.0), torch.ones(1, 1, 3, 4)
    out = projected_attention(Q, K, V, torch.eye(5), torch.eye(5))  # all scores are -800, those of empty slots 0
    torch.testing.assert_close(out, torch.ones_like(Q))


@pytest.mark.parametrize("start", ["pooling", "normal"])
@pytest.mark.parametrize("share", SHARES)
def test_padding_does_not_matter(share: str, start: str) -> None:
    """Neither what is in it nor how much of it there is."""
    model, batch = bert(rank=4, share=share, start=start), padded()
    keep, ids = batch["attention_mask"].bool(), batch["input_ids"]
    before = model(**batch).logits
    other = model(input_ids=ids.masked_fill(~keep, 17), attention_mask=keep.long()).logits
    torch.testing.assert_close(other[keep], before[keep], rtol=0, atol=0)
    for row in range(3):
        n = int(keep[row].sum())
        alone = model(input_ids=ids[row : row + 1, :n]).logits
        torch.testing.assert_close(alone[0], before[row, :n], rtol=1e-5, atol=1e-5)
    assert difference(model(input_ids=ids).logits[keep], before[keep]) > 1e-3  # the mask is not ignored


def test_not_a_number_in_padding_stays_there_and_a_row_of_padding_is_finite() -> None:
    Q, K, V = qkv(8)
    valid = (torch.arange(8) < torch.tensor([[8], [5], [0]]))[:, None]
    E = gaussian(3, 8, seed=5, dtype=WIDE).requires_grad_()
    clean = projected_attention(Q, K, V, E, E, valid)
    for x in (K, V):
        x[1, :, 5:] = torch.nan
    torch.testing.assert_close(projected_attention(Q, K, V, E, E, valid), clean, rtol=0, atol=0)
    assert bool((clean[2] == 0).all())
    clean.square().sum().backward()
    assert E.grad is not None
    assert bool(torch.isfinite(E.grad).all())


@pytest.mark.parametrize("masked", [True, False])
def test_the_gradient_is_that_of_the_function(masked: bool) -> None:
    Q, K, V = (x[:2].requires_grad_() for x in qkv(6, d=2))
    valid = (torch.arange(6) < torch.tensor([[6], [4]]))[:, None] if masked else None
    E, F = (gaussian(2, 3, 7, seed=i, dtype=WIDE).requires_grad_() for i in (4, 5))
    assert torch.autograd.gradcheck(lambda *x: projected_attention(*x, valid), (Q, K, V, E, F))


class Sizes(TorchDispatchMode):
    """The shape of every tensor that an operation puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)}
        return out


def encoder(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = tf.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                           intermediate_size=16, max_position_embeddings=512, **settings)  # fmt: skip
    return tf.BertModel(config).eval()


@pytest.mark.parametrize("masked", [True, False])
def test_nothing_is_n_by_n(masked: bool) -> None:
    """Neither a score, nor a mask, nor what is saved for backward; they are n x k."""
    n, k = 96, 6
    ids = torch.arange(2 * n).view(2, n) % 50
    batch = {"input_ids": ids, **({"attention_mask": (ids.flip(0) != 7).long()} if masked else {})}
    model = encoder()
    for linformer in (False, True):
        if linformer:
            use_linformer(model, length=n, rank=k)
        with sdpa_kernel(SDPBackend.MATH), Sizes() as sizes:
            kept = toys.saved(lambda: model(**batch)[0].sum())
        shapes = sizes.shapes | {tuple(t.shape) for t in kept}
        assert any(s[-2:] == (n, n) for s in shapes) is not linformer
        assert any(s in shapes for s in ((2, 2, n, k), (4, n, k))) is linformer
        assert (max(t.numel() for t in kept) >= 2 * 2 * n * n) is not linformer


def flops(model: nn.Module, n: int) -> int:
    ids = torch.zeros(1, n, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(input_ids=ids)
    return counter.get_total_flops()


def test_flops_are_linear_in_n() -> None:
    exact, short, long = (encoder().to("meta") for _ in range(3))
    weights = 6 * 2 * 16 * 16 * 128
    use_linformer(short, length=128, rank=8)
    use_linformer(long, length=256, rank=8)
    pooler = 2 * 16 * 16
    assert flops(long, 256) - pooler == 2 * (flops(short, 128) - pooler)
    assert flops(exact, 256) - pooler > 2.5 * (flops(exact, 128) - pooler)
    assert flops(short, 128) - pooler == weights + 4 * 2 * 128 * 8 * 16  # E K, F V, Q K'^T and P V'


def test_low_rank_weights_win_where_sequences_are_short_and_linformer_where_they_are_long() -> None:
    """The thesis' comparison at d = 256, in operations: it crosses between n = 256 and 2048."""
    config = tf.BertConfig(vocab_size=8, hidden_size=256, num_hidden_layers=1, num_attention_heads=4,
                           intermediate_size=1024, max_position_embeddings=2048)  # fmt: skip
    cost: dict[str, list[int]] = {}
    for name in ("dense", "lrt", "linformer", "both"):
        cost[name] = []
        for n in (256, 2048):
            model = tf.BertModel(config)
            if name in ("lrt", "both"):
                structure(model, "greenformers", rank=0.5, solver="random", layers=r"encoder.*")
            model.to("meta")
            if name in ("linformer", "both"):
                use_linformer(model, length=n, rank=256)
            cost[name].append(flops(model, n))
    assert cost["lrt"][0] < cost["dense"][0] < cost["linformer"][0]  # k = n saves nothing
    assert cost["linformer"][-1] < cost["lrt"][-1] < cost["dense"][-1]
    assert cost["both"][-1] < cost["linformer"][-1]


@pytest.mark.parametrize(("share", "matrices"), [("none", 288), ("headwise", 24), ("key_value", 12), ("layerwise", 1)])
def test_parameters_of_each_sharing(share: str, matrices: int) -> None:
    """The paper counts them for 12 layers of 12 heads."""
    model = tiny.build("bert", num_hidden_layers=12, hidden_size=24, num_attention_heads=12)
    before = count(model)
    names = use_linformer(model, length=20, rank=5, share=share)
    assert len(names) == 12
    assert count(model) - before == matrices * 5 * 20
    E, F = zip(*(model.get_submodule(name).projections() for name in names), strict=True)
    assert len({id(p) for p in (*E, *F)}) == (24 if share == "none" else matrices)
    assert all((e is f) == (share in ("key_value", "layerwise")) for e, f in zip(E, F, strict=True))


def test_grouped_keys_have_projections_of_their_own() -> None:
    torch.manual_seed(0)
    config = tf.EuroBertConfig(**{**tiny.GQA, "mask_token_id": 3})
    model = tf.EuroBertModel(config).eval()
    batch = padded()
    keep = batch["attention_mask"].bool()
    before, size = model(**batch)[0], count(model)
    use_linformer(model, length=9, rank=9, share="none")
    assert count(model) - size == 3 * 2 * 2 * 9 * 9  # layers, key heads, E and F
    torch.testing.assert_close(model(**batch)[0][keep], before[keep], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", SHARES)
def test_pooling_to_as_many_slots_changes_nothing(share: str) -> None:
    model, batch = tiny.build("bert"), padded()
    keep = batch["attention_mask"].bool()
    before = model(**batch).logits
    assert torch.equal(pooling(12, 12), torch.eye(12))
    use_linformer(model, length=12, rank=12, share=share)
    torch.testing.assert_close(model(**batch).logits[keep], before[keep], rtol=1e-5, atol=1e-5)


def test_pooling_takes_means_over_neighbours() -> None:
    P = pooling(3, 8)
    torch.testing.assert_close(P.sum(-1), torch.ones(3))
    assert [int(i) for i in (P > 0).sum(-1)] == [3, 3, 2]
    assert torch.equal((P > 0).sum(0), torch.ones(8, dtype=torch.long))
    torch.testing.assert_close(P @ torch.arange(8.0), torch.tensor([1.0, 4.0, 6.5]))


def test_normal_has_the_variance_of_the_paper_and_a_seed() -> None:
    draws = [bert(length=60, rank=20, share="headwise", start="normal", seed=s) for s in (0, 0, 1)]
    E, again, other = ([p.detach() for p in m.bert.encoder.layer[1].attention.self.projections()] for m in draws)
    assert float(E[0].var()) == pytest.approx(1 / 20, rel=0.15)
    assert torch.equal(E[0], again[0])
    assert not torch.equal(E[0], other[0])
    assert not torch.equal(E[0], E[1])


def test_more_slots_come_nearer_to_exact_attention() -> None:
    """Pooled, where neighbours resemble each other; random projections of the context by Johnson and Lindenstrauss."""
    n, d = 64, 8
    smooth = torch.linalg.matrix_power(0.5 * torch.eye(n) + 0.25 * (torch.eye(n).roll(1, 0) + torch.eye(n).roll(-1, 0)), 6)  # fmt: skip # noqa: E501
    Q, K, V = (3 * (smooth @ gaussian(2, 2, n, d, seed=i)).to(WIDE) for i in range(3))
    whole = exact(Q, K, V)
    P = (Q @ K.mT / d**0.5).softmax(-1)
    pooled, context = [], []
    for k in (2, 8, 32, 64):
        E = pooling(k, n).to(WIDE)
        pooled.append(float((projected_attention(Q, K, V, E, E) - whole).norm() / whole.norm()))
        errors = [P @ R.T @ R @ V - whole for R in (gaussian(k, n, seed=s, dtype=WIDE) / k**0.5 for s in range(30))]
        context.append(float(torch.stack(errors).square().mean().sqrt() / whole.square().mean().sqrt()))
    assert pooled[3] < 1e-6 < pooled[2] < pooled[1] < pooled[0]
    assert pooled[2] < 0.2
    for few, many in itertools.pairwise(context):
        assert many < 0.75 * few
    assert context[0] / context[2] == pytest.approx(4, rel=0.25)  # 1 / sqrt(k)


@pytest.mark.parametrize("share", SHARES)
def test_projections_are_trained(share: str) -> None:
    """Towards the outputs of the exact model, which the projections alone can come nearer to."""
    teacher, batch = tiny.build("bert", num_hidden_layers=2), padded()
    keep = batch["attention_mask"].bool()
    with torch.no_grad():
        target = teacher(**batch).logits[keep]
    model = bert(rank=3, share=share)
    trained = [p for n, p in model.named_parameters() if "linformer_" in n]
    assert len(trained) == {"none": 4, "headwise": 4, "key_value": 2, "layerwise": 1}[share]
    optimizer, losses = torch.optim.Adam(trained, lr=0.02), []
    for _ in range(25):
        loss = (model(**batch).logits[keep] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("share", SHARES)
def test_is_saved_and_loaded_by_plain_transformers(share: str, tmp_path: Path) -> None:
    model, batch = bert(rank=4, share=share, start="normal"), padded()
    logits = model(**batch).logits
    model.save_pretrained(tmp_path)
    assert [f.suffix for f in tmp_path.iterdir() if f.suffix != ".json"] == [".safetensors"]
    again = tf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert count(again) == count(model)
    assert torch.equal(again(**batch).logits, logits)
    again.save_pretrained(tmp_path / "again")
    body = tf.AutoModel.from_pretrained(tmp_path / "again", add_pooling_layer=False)
    assert torch.equal(body(**batch).last_hidden_state, model.bert(**batch).last_hidden_state)
    fresh = bert(rank=4, share=share)
    assert not torch.equal(fresh(**batch).logits, logits)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(**batch).logits, logits)


def test_a_copy_shares_nothing_with_the_model() -> None:
    model, batch = bert(rank=4, share="layerwise"), padded()
    twin, logits = copy.deepcopy(model), model(**batch).logits
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin(**batch).logits, logits)


def test_goes_together_with_low_rank_weights(tmp_path: Path) -> None:
    model, batch = bert(rank=4), padded()
    structure(model, "greenformers", rank=0.5).finish()
    assert sum(isinstance(m, Linformer) for m in model.modules()) == 2
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)
    assert [h["training"] for h in again.config.quantization_config.history] == ["linformer", "greenformers"]


def test_layers_left_out_and_another_implementation_are_exact() -> None:
    model, batch = tiny.build("bert"), padded()
    keep = batch["attention_mask"].bool()
    states = model.bert(**batch, output_hidden_states=True).hidden_states
    logits = model(**batch).logits
    names = use_linformer(model, length=9, rank=2, layers=r".*layer\.[12]\..*")
    assert names == [f"bert.encoder.layer.{i}.attention.self" for i in (1, 2)]
    now = model.bert(**batch, output_hidden_states=True).hidden_states
    torch.testing.assert_close(now[1][keep], states[1][keep], rtol=1e-5, atol=1e-5)
    assert difference(now[2][keep], states[2][keep]) > 1e-3
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(**batch).logits[keep], logits[keep], rtol=1e-5, atol=1e-5)


def windowed() -> tf.PreTrainedConfig:
    return tf.ModernBertConfig(**tiny.GATED, local_attention=8, cls_token_id=1, sep_token_id=2)


def test_windowed_layers_that_are_left_out_keep_their_windows() -> None:
    torch.manual_seed(0)
    model, batch = tf.ModernBertModel(windowed()).eval(), tiny.batches((2,), length=40, padded=True)[0]
    keep = batch["attention_mask"].bool()
    before = model(**batch)[0]
    assert use_linformer(model, length=40, rank=40, layers=r"layers\.0\.attn") == ["layers.0.attn"]
    torch.testing.assert_close(model(**batch)[0][keep], before[keep], rtol=1e-5, atol=1e-5)
    model.config.local_attention = 80
    assert difference(model(**batch)[0][keep], before[keep]) > 1e-3


def test_vision_half_precision_and_dropout() -> None:
    images = {"pixel_values": gaussian(2, 3, 12, 12)}
    vit = tiny.build("vit")
    before = vit(**images).logits
    use_linformer(vit, length=10, rank=10)
    torch.testing.assert_close(vit(**images).logits, before, rtol=1e-5, atol=1e-5)
    model, batch = bert(rank=4), padded()
    keep, logits = batch["attention_mask"].bool(), model(**batch).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(model(**batch).logits[keep], logits[keep]) < 0.05
    half = model.bfloat16()(**batch).logits
    assert half.dtype == torch.bfloat16
    assert difference(half[keep], logits[keep]) < 0.05
    Q, K, V = qkv(8)
    E = pooling(4, 8).to(WIDE)
    assert not torch.equal(projected_attention(Q, K, V, E, E, dropout=0.5), projected_attention(Q, K, V, E, E))


def test_masks_of_four_dimensions() -> None:
    """Those that say the same to every query are padding masks; the others, and biases, are refused."""
    model, batch = bert(rank=4), padded()
    keep, ids = batch["attention_mask"].bool(), batch["input_ids"]
    logits = model(**batch).logits
    wide = keep[:, None, None].expand(-1, 1, 9, -1)
    for mask in (wide, wide.clone(), torch.zeros(wide.shape).masked_fill(~wide, torch.finfo(torch.float32).min)):
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, logits, rtol=1e-6, atol=1e-6)
    causal = torch.ones(1, 1, 9, 9).tril().bool().expand(3, 1, 9, 9)
    with pytest.raises(ValueError, match=r"layer.0.attention.self: the mask differs between queries.*padding mask"):
        model(input_ids=ids, attention_mask=causal)
    with pytest.raises(ValueError, match=r"layer.0.attention.self: the mask adds to scores of single positions"):
        model(input_ids=ids, attention_mask=torch.linspace(-1, 0, 9).expand(3, 1, 9, 9))


def test_sequences_that_are_too_long() -> None:
    model = bert(length=8, rank=4)
    with pytest.raises(ValueError, match=r"bert.encoder.layer.0.attention.self projects sequences of at most 8, this one has 9.*length=9"):  # fmt: skip # noqa: E501
        model(**padded())
    Q, K, V = qkv(9)
    with pytest.raises(ValueError, match="a sequence of 9 does not fit projections of 8"):
        projected_attention(Q, K, V, pooling(4, 8), pooling(4, 8))


UNFIT: list[tuple[Any, str]] = [
    (lambda: tiny.build("llama"), r"layers.0.self_attn is causal, and Linformer has no causal form"),
    (lambda: tf.BertModel(tf.BertConfig(**tiny.GATED, is_decoder=True)), r"layer.0.attention.self is causal"),
    (
        lambda: tiny.build("mpnet"),
        r"MPNet\w+ does not compute its attention through .*: take a model that does",
    ),
    (lambda: tf.ModernBertModel(windowed()), r"layers.1.attn has a sliding window.*layers="),
    (lambda: nn.Linear(3, 3), r"Linear is no transformers model: call `projected_attention`"),
]


@pytest.mark.parametrize(("make", "message"), UNFIT)
def test_models_that_cannot_be_linformers(make: Any, message: str) -> None:
    model = make()
    classes = [type(m) for m in model.modules()]
    with pytest.raises((TypeError, ValueError), match=message):
        use_linformer(model, length=8, rank=4)
    assert [type(m) for m in model.modules()] == classes


def test_scores_of_single_positions_are_refused() -> None:
    t5 = tf.T5EncoderModel(tf.T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))
    use_linformer(t5, length=8, rank=4)
    with pytest.raises(ValueError, match="SelfAttention uses position_bias, which Linformer has no form of"):
        t5(input_ids=torch.ones(1, 5, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"layer.0.attention.self: linformer\(rank=0\): it is a positive integer"),
        ({"rank": 2.5}, r"rank=2.5\): it is a positive integer"),
        ({"length": True}, r"length=True\): it is a positive integer"),
        ({"rank": 13}, r"rank=13, length=12\): more slots than positions; lower the rank"),
        ({"share": "all"}, r"share='all'\): it is one of none, headwise, key_value, layerwise"),
        ({"start": "zeros"}, r"start='zeros'\): it is one of pooling, normal"),
        ({"layers": "nothing"}, r"no attention module of BertForMaskedLM matches layers='nothing'"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bert(**{"rank": 4, **settings})


def test_a_model_is_changed_once() -> None:
    model = bert(rank=4)
    with pytest.raises(ValueError, match=r"layer.0.attention.self is a Linformer already: load the model anew"):
        use_linformer(model, length=12, rank=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": "4"}, r"rank='4'\): it is a positive integer"),
        ({"share": "x"}, r"share='x'\): it is one of"),
        ({"share": "none"}, r"owns=False\): only layerwise"),
        ({"owns": True, "rank": 3}, r"mismatch|shape"),
        ({"length": 11}, r"needs the projections of one other layer"),
    ],
)
def test_a_checkpoint_is_not_trusted(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    bert(rank=4, share="layerwise").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"]["bert.encoder.layer.1.attention.self"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, RuntimeError), match=message):
        tf.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_checkpoint_that_names_another_module_or_lacks_a_tensor(tmp_path: Path) -> None:
    model = bert(rank=4)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    spec = modules["bert.encoder.layer.1.attention.self"]
    modules["bert.encoder.layer.1.output"] = spec
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layer.1.output: BertOutput is not an attention"):
        tf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    tensors = {k: v for k, v in model.state_dict().items() if not k.endswith("1.attention.self.linformer_E")}
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(ValueError, match=r"lacks bert.encoder.layer.1.attention.self.linformer_E"):
        tf.AutoModelForMaskedLM.from_pretrained(tmp_path)
