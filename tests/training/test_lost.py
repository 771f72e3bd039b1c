"""LOST against its card: the start, the chosen columns, counts, what is kept for backward, and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import eckart
import tiny
from eckart.forms import LowRank
from eckart.forms.layers import FactoredLinear
from eckart.forms.select import SelectMatrix
from eckart.testing import gaussian
from eckart.training import NoSaving, structure
from eckart.training.lost import LOST, Bottleneck

OUT, IN, RANK = 24, 20, 3


def layer(W: Tensor | None = None, bias: bool = True, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias)).double()
    if W is not None:
        model[0].weight.data.copy_(W)
    structure(model, "lost", **{"rank": RANK, "density": 0.2, **settings})
    return model[0]


def columns(made: nn.Module) -> list[int]:
    found = [m.index.tolist() for m in made.modules() if isinstance(m, SelectMatrix)]
    return found[0] if found else []


def leading(W: Tensor, rank: int = RANK) -> Tensor:
    U, S, Vh = torch.linalg.svd(W)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


@pytest.mark.filterwarnings("ignore::eckart.training.NoSaving")
def test_the_start_without_activation() -> None:
    W, x = gaussian(OUT, IN, seed=3, dtype=torch.float64), gaussian(5, IN, seed=4, dtype=torch.float64)
    half = layer(W, density=1.0, gamma=0.5, activation="none")
    torch.testing.assert_close(half(x), 0.5 * x @ (leading(W) + W).T + half.bias, rtol=1e-6, atol=1e-9)
    low = layer(W, density=0.0, gamma=1.0, activation="none")
    torch.testing.assert_close(low(x), x @ leading(W).T + low.bias, rtol=1e-6, atol=1e-9)
    only = layer(W, density=0.2, gamma=0.0)
    kept = torch.zeros_like(W)
    kept[:, columns(only)] = W[:, columns(only)]
    torch.testing.assert_close(only(x), x @ kept.T + only.bias, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_the_bottleneck_computes_what_it_says(bias: bool) -> None:
    W, x = gaussian(OUT, IN, seed=3, dtype=torch.float64), gaussian(2, 5, IN, seed=4, dtype=torch.float64)
    made = layer(W, bias=bias)
    assert isinstance(made, Bottleneck)
    B, A = made.low.parameters()
    torch.testing.assert_close(B @ A, leading(W), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(B.norm(dim=0), A.norm(dim=1), rtol=1e-6, atol=1e-9)
    kept = columns(made)
    wanted = 0.7 * F.silu(x @ A.T) @ B.T + 0.3 * x[..., kept] @ W[:, kept].T
    torch.testing.assert_close(made(x), wanted if made.bias is None else wanted + made.bias, rtol=1e-9, atol=1e-9)


def test_the_columns_are_those_that_the_leading_part_leaves_most_of() -> None:
    W = gaussian(OUT, IN, seed=5, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W)
    left = W.square().sum(0) - (S[:RANK, None] * Vh[:RANK]).square().sum(0)
    torch.testing.assert_close((W - leading(W)).square().sum(0), left, rtol=1e-6, atol=1e-9)
    assert columns(layer(W)) == left.topk(4).indices.sort().values.tolist()
    assert columns(layer(W, score="weight")) == W.norm(dim=0).topk(4).indices.sort().values.tolist()
    # a large column within the leading subspace is not chosen, one outside of it is
    inside, outside = U[:, 0] * 30, U[:, RANK:] @ gaussian(OUT - RANK, seed=6, dtype=torch.float64)
    W = leading(W) + 0.01 * W
    W[:, 2] = inside
    W[:, 7] = outside / outside.norm() * 2
    assert 7 in columns(layer(W))
    assert 2 not in columns(layer(W))
    assert 2 in columns(layer(W, score="weight"))
    zero = torch.zeros(OUT, IN, dtype=torch.float64)
    assert columns(layer(zero)) == [0, 1, 2, 3]


def test_columns_start_from_the_weight_or_from_the_complement() -> None:
    W = gaussian(OUT, IN, seed=5, dtype=torch.float64)
    for settings, wanted in (({}, W), ({"columns": "complement"}, W - leading(W))):
        made = layer(W, **settings)
        assert isinstance(made, Bottleneck)
        assert made.rest is not None
        kept = columns(made)
        torch.testing.assert_close(made.rest.dense()[:, kept], 0.3 * wanted[:, kept], rtol=1e-6, atol=1e-9)


def test_counts_and_what_is_kept_and_gradients_only_in_the_columns() -> None:
    made = layer(bias=False)
    assert sum(p.numel() for p in made.parameters()) == RANK * (OUT + IN) + 4 * OUT
    x = gaussian(2, IN, seed=4, dtype=torch.float64).requires_grad_()
    kept = toys.saved(lambda: made(x))
    assert kept
    assert max(t.numel() for t in kept) < OUT * IN
    flat = layer(gamma=0.0)
    flat(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum(0).nonzero().flatten().tolist() == columns(flat)


@pytest.mark.parametrize("activation", ["silu", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_is_saved_and_loaded_by_plain_transformers(name: str, activation: str, tmp_path: Path) -> None:
    model = tiny.build(name, num_hidden_layers=2) if name == "llama" else tiny.build(name, n_layer=2)
    structure(model, "lost", rank=4, density=0.1, activation=activation).finish()
    batch = tiny.batches((2,))[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    kinds = {spec["kind"] for spec in again.config.quantization_config.modules.values()}
    assert kinds <= {"bottleneck"} if activation == "silu" else kinds <= {"linear", "conv1d"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3, 3]}, "cannot stand in"),
        ({"low": "dense()"}, "not the parts of a bottleneck"),
        ({"rest": "low_rank(rank=9999)"}, "the rank is at most"),
        ({"scale": "much"}, "is not the scale"),
    ],
)
def test_a_checkpoints_word_is_not_trusted(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    structure(model, "lost", rank=2, density=0.1)
    first = next(iter(model.config.quantization_config.modules.values()))
    first.update(change)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_refusals() -> None:
    for settings, message in (
        ({"rank": 0}, "the rank is a positive integer"),
        ({"gamma": 1.5}, "gamma=1.5.*share from 0 to 1"),
        ({"density": 1.1}, "density=1.1.*share from 0 to 1"),
        ({"activation": "relu"}, "'silu' or 'none'"),
        ({"score": "both"}, "'complement' or 'weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            LOST(**settings)
    with pytest.raises(ValueError, match=r"0: low_rank.*the rank is at most 20"):
        layer(rank=21)
    with pytest.raises(ValueError, match="0: lost with gamma=0 and no columns"):
        layer(gamma=0.0, density=0.0)
    with pytest.warns(NoSaving, match="which saves nothing"):
        layer(rank=12)
    assert isinstance(layer(activation="none"), FactoredLinear)
    with pytest.raises(ValueError, match="0: lost has no activation inside a convolution"):
        structure(nn.Sequential(nn.Conv2d(3, 8, 3)), "lost", rank=2)
    assert LowRank(RANK) != eckart.Dense()
