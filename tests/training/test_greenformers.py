"""Greenformers' factorisation against its card: exact at full rank, the rank rule, the solvers, counts and refusals."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import tiny
from eckart.forms.layers import FactoredConv1D, FactoredConv2d, FactoredLinear
from eckart.testing import error_ratio, gaussian
from eckart.training import NoSaving, structure
from eckart.training.chains import ConvChain
from eckart.training.greenformers import Greenformers


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def made(module: nn.Module, **settings: Any) -> Any:
    model = nn.Sequential(module)
    structure(model, "greenformers", **settings)
    return model[0]


def test_an_svd_is_exact_at_full_rank_and_as_good_as_any_below() -> None:
    W = gaussian(20, 14, seed=1)
    for rank in (3, 7, 14):
        decoder, encoder = Greenformers(rank=rank).factors(W, rank, generator())
        S = torch.linalg.svdvals(W)[rank:]
        assert decoder.shape == (20, rank)
        assert encoder.shape == (rank, 14)
        assert float((decoder @ encoder - W).norm()) == pytest.approx(float(S.norm()), rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 40), lambda: nn.Linear(24, 40, bias=False), lambda: Conv1D(40, 24)])  # fmt: skip # noqa: E501
def test_a_linear_layer_is_two_with_its_own_bias(make: Any) -> None:
    torch.manual_seed(0)
    layer, x = make(), gaussian(5, 24)
    W = layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()
    bias = 0 if layer.bias is None else layer.bias.detach()
    new = made(layer, rank=6)
    assert isinstance(new, FactoredConv1D if isinstance(layer, Conv1D) else FactoredLinear)
    decoder, encoder = (p.detach() for p in new.parameters() if p.dim() == 2)
    torch.testing.assert_close(new(x), x @ encoder.T @ decoder.T + bias, rtol=1e-5, atol=1e-5)
    assert float((decoder @ encoder - W).norm()) == pytest.approx(float(torch.linalg.svdvals(W)[6:].norm()), rel=1e-2)
    assert count(new) == 6 * (24 + 40) + 40 * (layer.bias is not None)
    assert all(p.requires_grad for p in new.parameters())


GEOMETRIES: list[tuple[type[Any], Any, dict[str, Any]]] = [
    (nn.Conv2d, 3, {"stride": 2, "padding": 1}),
    (nn.Conv2d, (3, 5), {"dilation": (1, 2), "padding": (0, 2), "bias": False}),
    (nn.Conv2d, 3, {"groups": 2, "stride": (1, 2)}),
    (nn.Conv2d, 3, {"groups": 4, "padding": "same"}),
    (nn.Conv1d, 5, {"stride": 2, "padding": 2}),
    (nn.Conv1d, 5, {"groups": 2, "padding": 1, "padding_mode": "reflect"}),
    (nn.Conv3d, (2, 3, 3), {"padding": (1, 0, 1), "dilation": (1, 2, 1)}),
]


@pytest.mark.parametrize(("cls", "kernel", "settings"), GEOMETRIES)
def test_a_convolution_whose_rank_is_had_is_not_changed(cls: Any, kernel: Any, settings: Any) -> None:
    """As at full rank, which is never below break-even: every group's kernel is of rank 1, or of 2 where there is one group."""  # fmt: skip # noqa: E501
    torch.manual_seed(0)
    conv = cls(8, 16, kernel, **settings).double()
    g = conv.groups
    rank, out, K = max(2, g), 16 // g, conv.weight[0].numel()
    low = [gaussian(out, rank // g, seed=i, dtype=torch.float64) @ gaussian(rank // g, K, seed=9 + i, dtype=torch.float64) for i in range(g)]  # fmt: skip # noqa: E501
    conv.weight.data.copy_(torch.cat(low).view(conv.weight.shape))
    x = gaussian(2, 8, *(9, 8, 7)[: conv.weight.dim() - 2], seed=3, dtype=torch.float64)
    new = made(conv, rank=rank)
    assert isinstance(new, FactoredConv2d if cls is nn.Conv2d and g == 1 else ConvChain)
    torch.testing.assert_close(new(x), conv(x), rtol=1e-4, atol=1e-6)
    assert count(new) == rank * (K + out) + 16 * (conv.bias is not None)


@pytest.mark.parametrize("cls", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("groups", [1, 2])
def test_ced_at_full_rank_is_the_convolution(cls: Any, groups: int) -> None:
    conv = cls(4, 6, 3, padding=1, stride=2, groups=groups).double()
    rank = 6  # that of every kernel, all of its outputs
    parts = conv.weight.detach().flatten(1).chunk(groups)
    pairs = [Greenformers().factors(p, rank // groups, generator()) for p in parts]
    chain = ConvChain(conv, "encoder_decoder", rank, bias=True, dtype=torch.float64)
    chain.fill([torch.cat([e for _, e in pairs]), torch.cat([d for d, _ in pairs])], conv.bias)
    x = gaussian(2, 4, *[7] * (conv.weight.dim() - 2), dtype=torch.float64)
    torch.testing.assert_close(chain(x), conv(x), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(chain.kernel(), conv.weight.detach(), rtol=1e-4, atol=1e-6)


def test_the_rank_rule() -> None:
    layer = nn.Linear(48, 80)
    most = 48 * 80 // (48 + 80)
    assert Greenformers().most(layer) == most == 30
    assert Greenformers(rank=0.5).rank_of(layer) == Greenformers(rank=int(0.5 * most)).rank_of(layer) == 15
    assert Greenformers(rank=4.0).rank_of(layer) == 4
    for nothing in (0.01, most, most + 1, 1000):
        assert Greenformers(rank=nothing).rank_of(layer) is None
    conv = nn.Conv2d(32, 64, 3)
    assert Greenformers().most(conv) == 32 * 64 * 9 // (32 * 9 + 64)
    assert Greenformers(break_even="library").most(conv) == 32 * 64 // (32 + 64)
    grouped = nn.Conv2d(32, 64, 3, groups=8)
    assert Greenformers(rank=9).rank_of(grouped) == 16
    assert Greenformers(rank=0.25).rank_of(grouped) == 16  # 13 rounded up
    assert Greenformers(rank=1).rank_of(nn.Conv2d(16, 16, 3, groups=16)) is None  # nothing to share


@pytest.mark.parametrize("rank", [0.1, 0.5, 0.99, 4, 16, 40])
@pytest.mark.parametrize("rule", ["exact", "library"])
def test_no_model_grows_and_layers_at_break_even_are_untouched(rank: float, rule: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, groups=2), nn.Conv2d(24, 24, 3, groups=24), nn.Conv2d(24, 20, 1),
        nn.Flatten(), nn.Linear(80, 64), nn.Linear(64, 5), nn.Linear(5, 1),
    )  # fmt: skip
    before, shapes = list(model), [count(m) for m in model]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        structure(model, "greenformers", rank=rank, break_even=rule)
    method = Greenformers(rank=rank, break_even=rule)  # type: ignore[arg-type]
    for i, (old, new) in enumerate(zip(before, model, strict=True)):
        if isinstance(old, nn.Flatten):
            continue
        stays = method.rank_of(old) is None
        assert (new is old) == stays
        assert any(f"{i} stays as it is" in str(w.message) for w in told) == stays
        assert count(new) == shapes[i] if stays else count(new) < shapes[i]
    x = gaussian(2, 3, 8, 8)
    model.insert(4, nn.AdaptiveAvgPool2d(2))
    assert bool(torch.isfinite(model(x)).all())


@pytest.mark.filterwarnings("ignore::eckart.training.NoSaving")
def test_counts_of_whole_models_are_those_of_the_rule() -> None:
    """The shapes and counts that the library of the thesis gives, by its rule."""
    vgg = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    structure(vgg, "greenformers", rank=0.5, break_even="library")
    ranks = [int(0.5 * (i * o // (i + o))) for i, o in ((3, 16), (16, 32), (32, 32))]
    assert ranks == [1, 5, 8]
    assert count(vgg) == sum(r * (9 * i + o) + o for r, i, o in zip(ranks, (3, 16, 32), (16, 32, 32), strict=True))
    bert = tiny.build("bert", num_hidden_layers=2)
    before = count(bert)
    structure(bert, "greenformers", rank=0.5)
    attention, feed = 2 * 4 * (32 * 32 - 8 * 64), 2 * 2 * (32 * 48 - int(0.5 * (32 * 48 // 80)) * 80)
    assert count(bert) == before - attention - feed


@pytest.mark.parametrize("make", [lambda: nn.Linear(96, 64, bias=False), lambda: nn.Conv2d(24, 48, 3, bias=False), lambda: nn.Conv1d(32, 64, 3, groups=4, bias=False)])  # fmt: skip # noqa: E501
def test_random_factors_put_out_what_the_layer_does(make: Any) -> None:
    dense = fresh = 0.0
    for seed in range(20):
        torch.manual_seed(seed)
        layer = make()
        model = nn.Sequential(layer)
        structure(model, "greenformers", rank=12, solver="random", seed=seed)
        sides = {nn.Linear: (64, 96), nn.Conv2d: (2, 24, 8, 8), nn.Conv1d: (8, 32, 9)}[type(layer)]
        x = gaussian(*sides, seed=seed)
        with torch.no_grad():
            dense, fresh = dense + float(layer(x).var()), fresh + float(model(x).var())
    assert fresh == pytest.approx(dense, rel=0.2)


def test_the_factors_of_snmf_and_nmf_are_not_negative() -> None:
    W = gaussian(18, 12, seed=2)
    decoder, encoder = Greenformers(solver="snmf").factors(W, 4, generator())
    assert bool((decoder >= 0).all())
    assert error_ratio(decoder @ encoder, W) < 1
    layer = nn.Linear(24, 40)
    layer.weight.data.abs_()
    assert all(bool((p >= 0).all()) for p in made(layer, solver="nmf").matrix.parameters())
    with pytest.raises(ValueError, match=r"0: \d+ of 960 entries are negative.*take 'snmf' or 'svd'"):
        made(nn.Linear(24, 40), solver="nmf")


def test_by_design_it_learns_what_the_dense_model_learns() -> None:
    """The stand-in for speech: equal steps, and below half of the parameters in the hidden layers."""
    data, losses = toys.regression(20, 4), {}
    for name in ("dense", "lrt"):
        model = toys.mlp(20, 64, 64, 4)
        if name == "lrt":
            structure(model, "greenformers", rank=0.4, solver="random", layers="[02]")
            assert count(model[2]) < 0.5 * (64 * 64 + 64)
        before = toys.loss(model, data)
        toys.train(model, None, data, 250)
        losses[name] = toys.loss(model, data)
        assert losses[name] < 0.1 * before
    assert losses["lrt"] < 3 * losses["dense"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_is_saved_and_loaded_by_plain_transformers(name: str, tmp_path: Path) -> None:
    model = tiny.build(name, **({"num_hidden_layers": 1} if name == "llama" else {"n_layer": 1}))
    structure(model, "greenformers", rank=0.5, solver="snmf").finish()
    batch = tiny.batches((2,))[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)


def test_a_grouped_convolution_within_a_transformer_is_saved_and_loaded(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(16, 16),
        conv_stride=(2, 2), conv_kernel=(5, 3), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = Wav2Vec2Model(config).eval()
    structure(model, "greenformers", layers=r".*conv_layers\.1\.conv", rank=4).finish()
    assert sum(isinstance(m, ConvChain) for m in model.modules()) == 1
    sound = gaussian(1, 200)
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(sound).last_hidden_state, model(sound).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    for settings, message in (
        ({"rank": 0}, "rank=0.*a whole number, or a share"),
        ({"rank": -0.5}, "rank=-0.5.*a whole number, or a share"),
        ({"rank": 2.5}, "rank=2.5.*a whole number, or a share"),
        ({"solver": "sdv"}, "solver='sdv'.*one of svd, random, nmf, snmf"),
        ({"iterations": 0}, "iterations=0.*a positive integer"),
        ({"break_even": "never"}, "break_even='never'.*'exact' or 'library'"),
    ):
        with pytest.raises(ValueError, match=message):
            Greenformers(**settings)
    tied = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"0 shares its weight with 1.weight.*untie them"):
        structure(tied, "greenformers")
    broken = nn.Conv1d(8, 16, 3)
    broken.weight.data[1, 1, 1] = torch.inf
    with pytest.raises(ValueError, match="the weight of 0 holds NaN or infinity"):
        made(broken)
    model = tiny.build("llama", num_hidden_layers=1)
    structure(model, "greenformers", layers=".*q_proj", rank=4)
    with pytest.raises(ValueError, match="q_proj is factored already"):
        structure(model, "greenformers", rank=4)
    with pytest.warns(NoSaving, match="0 stays as it is: at this rank nothing would be saved"):
        made(nn.Linear(8, 8), rank=4)
    zero = nn.Linear(24, 40)
    nn.init.zeros_(zero.weight)
    with pytest.raises(ValueError, match=r"0: its weight is zero.*initialise it first"):
        made(zero, solver="random")
