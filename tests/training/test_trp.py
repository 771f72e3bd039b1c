"""TRP against its card: projections, the sub-gradient, what truncation costs afterwards, and lossless export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from eckart.forms import LowRank
from eckart.forms.layers import FactoredConv2d, FactoredLinear
from eckart.testing import gaussian
from eckart.training import NoSaving, structure
from eckart.training.chains import ConvChain
from eckart.training.separable import by_sides, from_sides
from eckart.training.trp import TRP, leading


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_a_projection_keeps_the_fewest_values_of_that_energy(energy: float) -> None:
    model = nn.Sequential(nn.Linear(20, 24), nn.Conv2d(3, 8, (3, 2)))
    before = [m.weight.detach().flatten(1).clone() for m in model]
    structure(model, "trp", energy=energy, nuclear=0.0).begin()
    for module, W in zip(model, before, strict=True):
        S = torch.linalg.svdvals(W.double()).square()
        after = module.weight.detach().flatten(1).double()
        rank = int(torch.linalg.matrix_rank(after, rtol=1e-5))
        assert float(S[:rank].sum()) >= energy * float(S.sum()) * (1 - 1e-6)
        assert float(S[: rank - 1].sum()) < energy * float(S.sum())
        torch.testing.assert_close(after.float(), LowRank(rank).fit(W).dense().detach(), rtol=1e-4, atol=1e-5)


def test_the_subgradient_is_the_derivative_of_the_nuclear_norm() -> None:
    W, step = gaussian(7, 7, seed=1, dtype=torch.float64), 1e-6 * gaussian(7, 7, seed=2, dtype=torch.float64)
    found = float((leading(W, 1.0).subgradient * step).sum())
    difference = torch.linalg.svdvals(W + step).sum() - torch.linalg.svdvals(W - step).sum()
    assert found == pytest.approx(float(difference) / 2, rel=1e-5)


def test_the_subgradient_is_added_once_on_the_steps_of_a_projection() -> None:
    models = [toys.mlp(6, 5, dtype=torch.float64) for _ in range(2)]
    seen: list[list[Tensor]] = [[], []]
    for i, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        schedule = structure(model, "trp", energy=1.0, period=2, nuclear=0.1 * i + 1e-300)
        schedule.begin(optimizer, 4)
        for step in range(4):
            for _ in range(2):
                model(gaussian(3, 6, seed=step, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            seen[i].append(model[0].weight.grad.clone())
            schedule.step()
            optimizer.zero_grad()
    U, _, Vh = torch.linalg.svd(models[1][0].weight.detach(), full_matrices=False)
    for step in range(4):
        wanted = 0.1 * U @ Vh if step % 2 == 0 else torch.zeros_like(U @ Vh)
        torch.testing.assert_close(seen[1][step] - seen[0][step], wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_subgradient_leaves_out_what_is_only_rounding(dtype: torch.dtype) -> None:
    low = gaussian(64, 3, seed=1) @ gaussian(3, 48, seed=2)
    model = nn.Sequential(nn.Linear(48, 64)).to(dtype)
    model[0].weight.data.copy_(low)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    schedule = structure(model, "trp", energy=1 - 1e-4, nuclear=1.0)
    schedule.begin(optimizer)
    optimizer.step()
    assert model[0].weight.grad is not None
    assert float(model[0].weight.grad.float().norm()) == pytest.approx(3**0.5, rel=1e-2)
    schedule.step()
    schedule.finish()
    assert str(model[0].matrix.form) == "low_rank(rank=3)"


def test_without_projection_and_subgradient_it_is_plain_training_and_state_is_left_alone() -> None:
    data = toys.regression(10, 4)
    plain, trp = toys.mlp(10, 12, 4), toys.mlp(10, 12, 4)
    toys.train(plain, None, data, 20, make=torch.optim.SGD)
    toys.train(trp, structure(trp, "trp", project=False, nuclear=0.0), data, 20, make=torch.optim.SGD)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), trp.parameters(), strict=True))
    model = toys.mlp(10, 12, 4)
    schedule = structure(model, "trp", period=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    toys.train(model, schedule, data, 4, optimizer=optimizer, total=10)
    buffers = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    weight = model[0].weight.detach().clone()
    schedule.after(5)
    assert not torch.equal(model[0].weight, weight)
    assert all(torch.equal(a, s["momentum_buffer"]) for a, s in zip(buffers, optimizer.state.values(), strict=True))


def truncated(model: nn.Sequential, rank: int, data: tuple[Tensor, Tensor]) -> float:
    """Loss once the middle weight has that rank."""
    other = toys.mlp(20, 48, 48, 4)
    other.load_state_dict(model.state_dict())
    other[2].weight.data.copy_(LowRank(rank).fit(other[2].weight.detach()).dense().detach())
    return toys.loss(other, data)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_truncation_costs_what_training_has_made_it_cost(seed: int) -> None:
    """The card's net: projected training loses almost nothing to a truncation that ruins plain training."""
    data = toys.regression(20, 4, seed=seed + 5)
    rises, ranks = {}, {}
    for name, settings in {"plain": None, "nuclear": {"project": False}, "trp": {"nuclear": 0.0}, "both": {}}.items():
        model = toys.mlp(20, 48, 48, 4, seed=seed)
        schedule = None
        if settings is not None:
            schedule = structure(model, "trp", layers="2", period=10, **{"nuclear": 1e-3, **settings})
        toys.train(model, schedule, data, 250, lr=5e-3)
        ranks[name] = len(leading(model[2].weight.detach(), 0.95).S)
        rises[name] = truncated(model, 8, data) - toys.loss(model, data)
    assert rises["plain"] > 3 * max(rises["trp"], 0.0)
    assert rises["plain"] > 3 * max(rises["both"], 0.0)
    assert ranks["both"] <= ranks["trp"] < ranks["plain"]
    assert ranks["both"] < ranks["nuclear"]


def test_the_exported_factors_lose_nothing_after_the_last_projection() -> None:
    data = toys.regression(20, 4)
    model = toys.mlp(20, 48, 48, 4)
    schedule = structure(model, "trp", layers="2", period=15, energy=0.8)
    toys.train(model, schedule, data, 100)  # the last one is at the end, which 15 does not divide
    before = model(data[0]).detach()
    schedule.finish()
    assert isinstance(model[2], FactoredLinear)
    torch.testing.assert_close(model(data[0]), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (3, 1)])
def test_a_kernel_becomes_two_convolutions(kernel: tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 16, kernel, padding=1, stride=(1, 2))
    model, x = nn.Sequential(conv), torch.randn(2, 6, 9, 8)
    schedule = structure(model, "trp", energy=0.3, nuclear=0.0)
    schedule.begin(total=1)
    wanted = F.conv2d(x, conv.weight, conv.bias, stride=(1, 2), padding=1)
    schedule.finish()
    assert isinstance(model[0], FactoredConv2d)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel", "settings"), [((3, 3), {"padding": 1}), ((5, 3), {"padding": (2, 0), "stride": (1, 2), "bias": False}), ((3, 5), {"dilation": (2, 1)}), ((3, 3), {"padding": 1, "padding_mode": "circular"})])  # fmt: skip # noqa: E501
def test_a_kernel_becomes_one_convolution_along_each_side(kernel: tuple[int, int], settings: Any) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 16, kernel, **settings)
    model, x = nn.Sequential(conv), torch.randn(2, 6, 9, 8)
    schedule = structure(model, "trp", energy=0.3, nuclear=0.0, split="spatial")
    schedule.begin(total=1)
    rank = int(torch.linalg.matrix_rank(by_sides(conv.weight), rtol=1e-4))
    wanted = conv(x).detach()
    schedule.finish()
    made = model[0]
    assert isinstance(made, ConvChain)
    assert made.rank == rank
    assert sum(p.numel() for p in made.parameters()) == rank * (6 * kernel[0] + 16 * kernel[1]) + 16 * (conv.bias is not None)  # fmt: skip # noqa: E501
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(from_sides(by_sides(conv.weight), conv.weight.shape), conv.weight)


def test_what_no_factors_would_shrink_stays_dense_and_is_told() -> None:
    model = toys.mlp(10, 12)
    weight = model[0].weight.detach().clone()
    schedule = structure(model, "trp", energy=1.0, nuclear=0.0)
    with pytest.warns(NoSaving, match="0 stays dense: two factors of its rank 10"):
        schedule.finish()
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0].weight, weight)


def test_resumes_bit_for_bit(tmp_path: Path) -> None:
    data = toys.regression(10, 4)
    make: Any = lambda p, lr: torch.optim.SGD(p, lr=0.05, momentum=0.9)  # noqa: E731
    whole = toys.mlp(10, 12, 4)
    toys.train(whole, structure(whole, "trp", period=4, nuclear=1e-2), data, 10, make=make)
    cut = toys.mlp(10, 12, 4)
    schedule = structure(cut, "trp", period=4, nuclear=1e-2)
    optimizer = toys.train(cut, schedule, data, 8, make=make, total=10)
    torch.save({"model": cut.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, tmp_path / "x")  # fmt: skip # noqa: E501
    state = torch.load(tmp_path / "x", weights_only=True)
    again = toys.mlp(10, 12, 4, seed=7)
    schedule = structure(again, "trp", period=4, nuclear=1e-2)
    again.load_state_dict(state["model"])
    schedule.load_state_dict(state["schedule"])
    optimizer = make(again.parameters(), lr=0.05)
    optimizer.load_state_dict(state["optimizer"])
    toys.train(again, schedule, data, 10, optimizer=optimizer, start=8)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::eckart.training.NoSaving")
def test_is_saved_and_loaded_by_plain_transformers(tmp_path: Path) -> None:
    model = tiny.build("gpt2", n_layer=1)
    schedule = structure(model, "trp", energy=0.4, nuclear=0.0)
    schedule.begin(total=3)
    schedule.finish()
    batch = tiny.batches((2,))[0]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)
    assert again.config.quantization_config.modules


def test_refusals() -> None:
    for settings, message in (
        ({"energy": 0.0}, "energy=0.0.*a share above 0"),
        ({"energy": 1.1}, "energy=1.1.*a share above 0"),
        ({"period": 0}, "a positive number of steps"),
        ({"nuclear": -1.0}, "not negative"),
        ({"threshold": 1.0}, "a share from 0 to 1"),
        ({"split": "both"}, "'channel' or 'spatial'"),
    ):
        with pytest.raises(ValueError, match=message):
            TRP(**settings)
    with pytest.raises(ValueError, match="no layer of Sequential is targeted"):
        structure(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "trp")
    model = toys.mlp(4, 3)
    model[0].weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="the weight of 0"):
        structure(model, "trp")
