"""DSFormer's straight-through factoriser against its card: gradients, moving supports, bytes, the order on tasks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import tiny
from eckart.forms import LowRank
from eckart.forms.block_dictionary import BlockDictionary
from eckart.forms.layers import FactoredLinear
from eckart.testing import error_ratio, gaussian
from eckart.training import NoSaving, structure
from eckart.training.dsformer_stf import DSFormerSTF

SMALL: dict[str, Any] = {"nonzeros": 2, "atoms": 6, "block": 8, "refresh": 5, "iterations": 5}


def placed(module: nn.Module, **settings: Any) -> tuple[Any, Any]:
    """The model of one layer, and what its weight goes through."""
    model = nn.Sequential(module)
    schedule = structure(model, "dsformer_stf", **{**SMALL, **settings})
    return schedule, model[0].parametrizations.weight[0]  # type: ignore[union-attr, index]


@pytest.mark.parametrize("make", [lambda: nn.Linear(20, 24), lambda: Conv1D(24, 20), lambda: nn.Conv2d(5, 24, 2)])
def test_the_gradient_of_the_latent_weight_is_that_of_the_projected_one(make: Any) -> None:
    torch.manual_seed(0)
    schedule, straight = placed(make().double())
    layer: Any = schedule.model[0]
    latent, projected = layer.parametrizations.weight.original, layer.weight
    assert projected.shape == latent.shape
    x = gaussian(3, 5, 4, 4, dtype=torch.float64) if isinstance(layer, nn.Conv2d) else gaussian(7, 20, dtype=torch.float64)  # fmt: skip # noqa: E501
    loss = layer(x).tanh().square().sum()
    loss.backward()
    other = projected.detach().clone().requires_grad_()
    copied = make().double()
    copied.load_state_dict({"weight": other, **({} if layer.bias is None else {"bias": layer.bias})})
    copied(x).tanh().square().sum().backward()
    torch.testing.assert_close(latent.grad, copied.weight.grad, rtol=1e-12, atol=1e-12)
    # and the atoms get the derivative of S D by D
    X, D = straight.codes(latent.detach(), straight.index.long()), straight.atoms.detach().clone().requires_grad_()
    W = torch.einsum("ojk,jkb->ojb", X, D).flatten(1)[:, :20]
    G = latent.grad.t() if isinstance(layer, Conv1D) else latent.grad.flatten(1)
    (W * G).sum().backward()
    torch.testing.assert_close(straight.atoms.grad, D.grad, rtol=1e-9, atol=1e-12)


def test_the_projection_is_the_same_within_autocast() -> None:
    torch.manual_seed(0)
    schedule, straight = placed(nn.Linear(20, 24))
    layer: Any = schedule.model[0]
    outside = layer.weight.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.weight, outside)
        layer(gaussian(7, 20)).float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in (layer.parametrizations.weight.original, straight.atoms))


def test_the_codes_are_the_least_squares_ones_on_their_supports() -> None:
    torch.manual_seed(0)
    schedule, straight = placed(nn.Linear(20, 24).double())
    layer: Any = schedule.model[0]
    W, index = layer.parametrizations.weight.original.detach(), straight.index.long()
    padded = F.pad(W, (0, 1)).view(24, 3, 7)
    assert straight.atoms.shape == (3, 6, 7)  # blocks as equal as the width allows
    assert index.shape == (24, 3, 2)
    wanted = torch.zeros_like(padded)
    for o in range(24):
        for j in range(3):
            D = straight.atoms.detach()[j, index[o, j]]
            wanted[o, j] = torch.linalg.lstsq(D.T, padded[o, j, :, None]).solution[:, 0] @ D
    torch.testing.assert_close(layer.weight.detach(), wanted.flatten(1)[:, :20], rtol=1e-4, atol=1e-5)
    start = BlockDictionary(2, 6, 8, iterations=5).fit(W).dense().detach()
    assert float((layer.weight.detach() - W).square().sum()) <= float((start - W).square().sum()) * (1 + 1e-6)


def test_supports_move_from_a_bad_start_and_stay_once_they_are_frozen() -> None:
    data = toys.regression(16, 4)
    model = toys.mlp(16, 32, 4)
    schedule = structure(model, "dsformer_stf", layers="0", **{**SMALL, "frozen": 0.8})
    straight = model[0].parametrizations.weight[0]  # type: ignore[union-attr, index]
    straight.index.copy_(torch.tensor([0, 1], dtype=torch.uint8).expand_as(straight.index))  # the same atoms for all
    bad = toys.loss(model, data)
    supports = []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(100):
        toys.train(model, schedule, data, step + 1, start=step, optimizer=optimizer, total=100)
        supports.append(straight.index.clone())
    moved = [t + 1 for t in range(1, 100) if not torch.equal(supports[t], supports[t - 1])]
    assert moved[0] == 5
    assert all(t % 5 == 0 for t in moved)
    assert 10 < max(moved) <= 80
    assert bool((supports[-1] != torch.tensor([0, 1])).any(2).float().mean() > 0.5)
    assert toys.loss(model, data) < 0.5 * bad


def test_a_choice_of_supports_never_loses() -> None:
    torch.manual_seed(0)
    _, straight = placed(nn.Linear(24, 32))
    W = gaussian(32, 24, seed=3)
    before = float(straight.error(W, straight.index.long()).sum())
    for sweeps in (0, 0, 1, 2):
        straight.refresh(W, sweeps)
        after = float(straight.error(W, straight.index.long()).sum())
        assert after <= before * (1 + 1e-5)
        before = after
    index = straight.index.long()
    assert bool((index[..., 1:] > index[..., :-1]).all())


def test_as_many_entries_as_atoms_are_the_svd_of_every_block() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 32)
    W = layer.weight.detach().clone()
    schedule, _ = placed(layer, nonzeros=3, atoms=3, block=12)
    found = schedule.model[0].weight.detach() - W
    for block in (slice(0, 12), slice(12, 24)):
        S = torch.linalg.svdvals(W[:, block])[3:]
        assert float(found[:, block].norm()) == pytest.approx(float(S.norm()), rel=1e-4)


def test_the_start_beats_svd_at_equal_bytes_unless_the_matrix_is_globally_low() -> None:
    plain, low = gaussian(96, 64), gaussian(96, 8, seed=1) @ gaussian(8, 64, seed=2) + 0.1 * gaussian(96, 64, seed=3)
    for W, wins in ((plain, True), (low, False)):
        layer = nn.Linear(64, 96, bias=False)
        layer.weight.data.copy_(W)
        schedule, _ = placed(layer, nonzeros=8, atoms=24, block=32, iterations=8)
        error = error_ratio(schedule.model[0].weight.detach(), W)
        schedule.finish()
        rank = math.ceil(schedule.model[0].matrix.nbytes / 4 / (96 + 64))
        assert (error < 0.95 * error_ratio(LowRank(rank).fit(W).dense().detach(), W)) == wins


def test_what_is_stored_is_what_was_computed_in_the_bytes_of_the_formula() -> None:
    data = toys.regression(20, 4)
    model = toys.mlp(20, 32, 4)
    schedule = structure(model, "dsformer_stf", layers="0", **SMALL)
    toys.train(model, schedule, data, 12)
    before = model(data[0]).detach()
    schedule.finish()
    assert isinstance(model[0], FactoredLinear)
    torch.testing.assert_close(model(data[0]), before, rtol=1e-4, atol=1e-5)
    matrix: Any = model[0].matrix
    entries = (matrix.left.dense() != 0).view(32, 3, 6).sum(2)
    assert torch.equal(entries, torch.full_like(entries, 2))
    choices = math.ceil(math.log2(math.comb(6, 2)))  # bits for both places, where two indices would take 6
    bits = 32 * math.ceil(3 * choices / 8)
    tensors = sum(t.numel() * t.element_size() for t in matrix.state_dict().values())
    assert tensors == matrix.nbytes == 4 * (3 * 6 * 7 + 32 * 3 * 2) + bits
    assert bits <= 32 * math.ceil(3 * 2 * math.ceil(math.log2(6)) / 8)
    assert not any("original" in name for name, _ in model.named_parameters())


def compared(start: nn.Module, data: tuple[Tensor, Tensor], layers: str, train: Any, svd: int, refresh: int, form: dict[str, int]) -> dict[str, float]:  # fmt: skip # noqa: E501
    """Loss after equal steps from one trained model: STF, its start with frozen supports, and SVD."""
    words = f"block_dictionary(nonzeros={form['nonzeros']}, atoms={form['atoms']}, block={form['block']})"
    losses, sizes = {}, {}
    for name in ("stf", "frozen", "svd"):
        model = copy.deepcopy(start)
        if name == "stf":
            schedule = structure(model, "dsformer_stf", layers=layers, refresh=refresh, **form)
        else:
            schedule = structure(model, form=words if name == "frozen" else f"low_rank(rank={svd})", layers=layers)
        losses[name] = train(model, schedule, data)
        schedule.finish()
        sizes[name] = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert sizes["stf"] == sizes["frozen"] < sizes["svd"]
    return losses


def test_moving_supports_end_below_frozen_ones_and_these_below_svd() -> None:
    sums = dict.fromkeys(("stf", "frozen", "svd"), 0.0)

    def train(model: nn.Module, schedule: Any, data: tuple[Tensor, Tensor]) -> float:
        toys.train(model, schedule, data, 120)
        return toys.loss(model, data)

    for seed in range(3):
        data = toys.regression(16, 8, rows=512, seed=seed)
        start = toys.mlp(16, 64, 64, 8, seed=seed)
        toys.train(start, None, data, 400)
        for name, loss in compared(start, data, "2", train, 9, 25, {"nonzeros": 2, "atoms": 8, "block": 16}).items():
            sums[name] += loss / 3
    assert sums["stf"] < sums["frozen"] < sums["svd"]


class Encoder(nn.Module):
    """Two blocks of attention and a feed-forward layer, and a class from the mean."""

    def __init__(self, width: int = 32, heads: int = 4, words: int = 24, length: int = 8, classes: int = 4):
        super().__init__()
        self.words, self.heads = nn.Embedding(words, width), heads
        self.places = nn.Parameter(0.3 * torch.randn(length, width))
        sizes = {**dict.fromkeys("qkvo", (width, width)), "up": (width, 2 * width), "down": (2 * width, width)}
        self.blocks = nn.ModuleList(nn.ModuleDict({k: nn.Linear(*s) for k, s in sizes.items()}) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.head = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places
        for n, block in enumerate(self.blocks):
            b: Any = block
            y = self.norms[2 * n](x)
            q, k, v = (b[part](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in "qkv")
            x = x + b["o"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + b["down"](F.gelu(b["up"](self.norms[2 * n + 1](x))))
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.mark.slow
def test_the_order_on_a_transformers_task_at_a_third_of_the_bytes() -> None:
    sums = dict.fromkeys(("stf", "frozen", "svd"), 0.0)

    def train(model: nn.Module, schedule: Any, data: tuple[Tensor, Tensor], steps: int = 150) -> float:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        if schedule is not None:
            schedule.begin(optimizer, steps)
        for step in range(steps):
            rows = torch.randint(len(data[0]), (64,), generator=torch.Generator().manual_seed(step))
            F.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return F.cross_entropy(model(data[0]), data[1]).item()

    for seed in range(3):
        ids = torch.randint(0, 24, (1024, 8), generator=torch.Generator().manual_seed(seed))
        data = ids, ((ids[:, :4] > 11).sum(1) + 2 * (ids[:, 4] % 2 == ids[:, 7] % 2)) % 4
        torch.manual_seed(seed)
        start = Encoder()
        train(start, None, data, 300)
        for name, loss in compared(start, data, r"blocks\..*", train, 6, 50, {"nonzeros": 2, "atoms": 8, "block": 32}).items():  # fmt: skip # noqa: E501
            sums[name] += loss / 3
    assert sums["stf"] < sums["frozen"] < sums["svd"]


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = toys.regression(10, 4)
    whole, cut, again = toys.mlp(10, 12, 4), toys.mlp(10, 12, 4), toys.mlp(10, 12, 4, seed=7)
    make: Any = lambda m: structure(m, "dsformer_stf", layers="0", **{**SMALL, "refresh": 3})  # noqa: E731
    toys.train(whole, make(whole), data, 12)
    schedule = make(cut)
    optimizer = toys.train(cut, schedule, data, 7, total=12)
    torch.save({"model": cut.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "x")  # fmt: skip # noqa: E501
    state = torch.load(tmp_path / "x", weights_only=True)
    schedule = make(again)
    again.load_state_dict(state["model"])
    schedule.load_state_dict(state["schedule"])
    optimizer = torch.optim.Adam(again.parameters(), lr=3e-3)
    optimizer.load_state_dict(state["optimizer"])
    toys.train(again, schedule, data, 12, optimizer=optimizer, start=7)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_is_saved_and_loaded_by_plain_transformers(name: str, tmp_path: Path) -> None:
    model = tiny.build(name, **({"num_hidden_layers": 1} if name == "llama" else {"n_layer": 1}))
    structure(model, "dsformer_stf", nonzeros=2, atoms=8, block=16, iterations=2).finish()
    batch = tiny.batches((2,))[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)
    assert any("block_dictionary" in spec["form"] for spec in again.config.quantization_config.modules.values())


def test_a_zero_weight_and_diverged_training() -> None:
    layer = nn.Linear(16, 16)
    nn.init.zeros_(layer.weight)
    schedule, _ = placed(layer, frozen=100)
    assert not bool(schedule.model[0].weight.any())
    schedule.model[0].parametrizations.weight.original.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weight of 0 is no longer finite: training has diverged"):
        schedule.after(5)


def test_refusals() -> None:
    for settings, message in (
        ({"nonzeros": 9, "atoms": 8}, "nonzeros=9, atoms=8.*no more entries than there are atoms"),
        ({"nonzeros": 0}, "nonzeros=0.*a positive integer"),
        ({"atoms": 65}, "at most 64 atoms"),
        ({"atoms": 0}, "atoms=0"),
        ({"block": 0}, "block=0"),
        ({"refresh": 0}, "refresh=0.*a positive integer"),
        ({"sweeps": -1}, "sweeps=-1.*a number of sweeps"),
        ({"frozen": 1.5}, "frozen=1.5.*a share of the run"),
    ):
        with pytest.raises(ValueError, match=message):
            DSFormerSTF(**settings)
    with pytest.raises(ValueError, match="0: 20 atoms are more than its 16 rows"):
        placed(nn.Linear(16, 16), atoms=20)
    with pytest.raises(ValueError, match=r"0: .*a code has at most 4 entries"):
        placed(nn.Linear(4, 16), nonzeros=5)
    schedule, _ = placed(nn.Linear(8, 8), nonzeros=6, frozen=10)
    with pytest.warns(NoSaving, match=r"0 stays dense: block_dictionary.* would be no smaller"):
        schedule.finish()
    assert type(schedule.model[0]) is nn.Linear
