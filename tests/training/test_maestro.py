"""Maestro against its card: what its objective finds, tails, prefixes, turns, cuts and saving."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from eckart.forms.layers import FactoredConv2d, FactoredLinear
from eckart.forms.nested import NestedProduct
from eckart.testing import gaussian
from eckart.training import structure
from eckart.training.maestro import Maestro, OrderedTraining, importance, lasso

SPECTRUM = torch.tensor([3, 2.5, 2, 1.6, 1.2, 0.8, 0, 0], dtype=torch.float64)


def product(model: nn.Module, name: str = "0") -> NestedProduct:
    module: Any = model.get_submodule(name)
    assert isinstance(module.matrix, NestedProduct)
    return module.matrix


def minimise(model: nn.Module, x: Tensor, y: Tensor, widths: list[int]) -> None:
    """The mean of the loss over these widths of the first layer, to the end."""
    nested = product(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1, max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")  # fmt: skip # noqa: E501

    def closure() -> Any:
        optimizer.zero_grad()
        total = torch.zeros((), dtype=x.dtype)
        for width in widths:
            nested.width = width
            total = total + (model(x) - y).square().sum()
        total.backward()
        return total

    optimizer.step(closure)


def linear_map() -> tuple[Tensor, Tensor]:
    """A (10, 8) of a known spectrum, and inputs as many as it has columns, all directions alike."""
    U, V = (torch.linalg.qr(gaussian(n, 8, seed=n, dtype=torch.float64)).Q for n in (10, 8))
    return U * SPECTRUM @ V.T, torch.eye(8, dtype=torch.float64)


@pytest.mark.parametrize("widths", [list(range(1, 9)), [8]])
def test_ordered_widths_find_the_svd_of_a_linear_map_and_the_full_width_alone_does_not(widths: list[int]) -> None:
    A, x = linear_map()
    model = toys.mlp(8, 10, seed=3, dtype=torch.float64)
    structure(model, "maestro")
    model[0].bias.requires_grad_(False).zero_()
    minimise(model, x, x @ A.T, widths)
    nested = product(model)
    optimal = [float(SPECTRUM[b:].square().sum().sqrt()) for b in range(1, 9)]
    errors = []
    for b in range(1, 9):
        left, right = nested.factors(b)
        errors.append(float((A - left @ right).detach().norm()))
    if len(widths) == 1:
        assert errors[-1] < 1e-5
        assert max(e - o for e, o in zip(errors, optimal, strict=True)) > 0.1
        return
    assert errors[:5] == pytest.approx(optimal[:5], abs=1e-5)
    assert errors[5:] == pytest.approx(optimal[5:], abs=1e-3)  # zeros are approached slowly
    left, right = nested.factors(8)
    norms = left.norm(dim=0) * right.norm(dim=1)
    torch.testing.assert_close(norms.detach(), SPECTRUM, rtol=0, atol=1e-3)


def test_ordered_widths_find_the_principal_subspaces_of_correlated_data() -> None:
    mix = torch.linalg.qr(gaussian(6, 6, seed=2, dtype=torch.float64)).Q
    x = gaussian(200, 6, seed=4, dtype=torch.float64) * torch.tensor([3.0, 2.2, 1.5, 1.0, 0.6, 0.3]) @ mix.T
    model = toys.mlp(6, 6, seed=5, dtype=torch.float64)
    structure(model, "maestro")
    model[0].bias.requires_grad_(False).zero_()
    minimise(model, x, x, list(range(1, 7)))
    V = torch.linalg.svd(x).Vh.T
    for b in range(1, 6):
        left, _ = product(model).factors(b)
        Q = torch.linalg.qr(left.detach()).Q
        cosines = torch.linalg.svdvals(V[:, :b].T @ Q)
        assert float(cosines.min()) > 1 - 1e-4  # an angle of 0.014


def test_training_in_turns_brings_the_components_in_order() -> None:
    A, x = linear_map()
    model = toys.mlp(8, 10, seed=3, dtype=torch.float64)
    schedule = structure(model, "maestro", lasso=0.0)
    model[0].bias.requires_grad_(False).zero_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03)
    schedule.begin(optimizer)
    before = float((A - torch.linalg.multi_dot(list(product(model).factors(2)))).detach().norm())
    for _ in range(600):
        (model(x) - x @ A.T).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    left, right = product(model).factors(2)
    best = float(SPECTRUM[2:].square().sum().sqrt())
    assert float((A - left @ right).detach().norm()) - best < 0.1 * (before - best)


def test_the_lasso_is_the_sum_of_tail_norms_and_importance_never_grows() -> None:
    nested = NestedProduct(gaussian(7, 5, seed=1, dtype=torch.float64), gaussian(5, 6, seed=2, dtype=torch.float64))
    left, right = nested.factors()
    brute = sum(left[:, i:].norm() + right[i:].norm() for i in range(5))
    torch.testing.assert_close(lasso(nested), torch.as_tensor(brute), rtol=1e-9, atol=1e-9)
    found = importance(nested)
    assert bool((found[1:] <= found[:-1]).all())
    torch.testing.assert_close(found[2], (left[:, 2:].norm() * right[2:].norm()).detach())
    nested.left.weight.data[:, 3:] = 0
    nested.right.weight.data[3:] = 0
    gradients = torch.autograd.grad(lasso(nested), list(nested.parameters()))
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_prefixes_of_linear_layers_and_of_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(1), nn.Linear(8 * 16, 5)).double()
    x = gaussian(2, 3, 4, 4, seed=1, dtype=torch.float64)
    wanted = model(x).detach()
    W = model[0].weight.detach().clone()
    structure(model, "maestro", layers="0|2")
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-7)
    assert isinstance(model[0], FactoredConv2d)
    nested = product(model)
    nested.width = 3
    U, S, Vh = torch.linalg.svd(W.flatten(1), full_matrices=False)
    kernel = (U[:, :3] * S[:3] @ Vh[:3]).view_as(W)
    torch.testing.assert_close(model[0](x), F.conv2d(x, kernel, model[0].bias, padding=1), rtol=1e-6, atol=1e-9)
    head = product(model, "2")
    head.width = 0
    torch.testing.assert_close(model[2](gaussian(4, 128, dtype=torch.float64)), model[2].bias.expand(4, 5))
    assert model[2](torch.zeros(0, 128, dtype=torch.float64)).shape == (0, 5)


def test_every_pair_of_layer_and_width_has_its_turn() -> None:
    model = toys.mlp(4, 5, 3)
    schedule = structure(model, "maestro", lasso=0.0, shrink_every=1000)
    schedule.begin()
    assert isinstance(schedule, OrderedTraining)
    turns = []
    for _ in range(3 * 7):
        turns.append(tuple(p.width for p in schedule.products))
        schedule.step()
    full, pairs = (4, 3), [*((w, 3) for w in range(1, 5)), *((4, w) for w in range(1, 4))]
    assert full in pairs
    for i in (0, 7, 14):
        assert Counter(turns[i : i + 7]) == Counter(pairs)
    assert turns[:7] != turns[7:14]
    again = structure(toys.mlp(4, 5, 3), "maestro", lasso=0.0)
    again.load_state_dict({"steps": 9})
    again.begin()
    assert isinstance(again, OrderedTraining)
    assert tuple(p.width for p in again.products) == turns[9]
    coarse = structure(toys.mlp(16, 16), "maestro", lasso=0.0, widths=4)
    coarse.begin()
    assert isinstance(coarse, OrderedTraining)
    assert coarse._widths(16) == [4, 8, 12, 16]


def test_ranks_shrink_with_the_lasso_are_cut_and_saved_with_the_optimiser_untouched() -> None:
    x = gaussian(256, 16, seed=1)
    data = (x, x @ (gaussian(16, 3, seed=2) @ gaussian(3, 12, seed=3)) / 8)
    ranks = {}
    for weight in (1e-3, 1e-1):
        model = toys.mlp(16, 12)
        schedule = structure(model, "maestro", lasso=weight, threshold=1e-2, shrink_every=50)
        optimizer = toys.train(model, schedule, data, 300, lr=1e-2)
        ranks[weight] = int(product(model).rank)
        assert optimizer.state[product(model).left.weight]["exp_avg"].shape == (12, 12)
    assert 1 <= ranks[1e-1] <= 3 <= ranks[1e-3] < 12
    product(model).width = int(product(model).rank)
    before = model(x).detach()
    schedule.finish()
    schedule.finish()  # once is enough, twice does no harm
    assert isinstance(model[0], FactoredLinear)
    assert str(model[0].matrix.form) == f"low_rank(rank={ranks[1e-1]})"
    torch.testing.assert_close(model(x), before)


def test_what_factors_would_not_shrink_is_multiplied_out() -> None:
    model = toys.mlp(6, 6)
    weight = model[0].weight.detach().clone()
    schedule = structure(model, "maestro")
    schedule.finish()
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0].weight, weight, rtol=1e-5, atol=1e-6)


def test_is_saved_and_loaded_by_plain_transformers(tmp_path: Path) -> None:
    model = tiny.build("llama", num_hidden_layers=1)
    schedule = structure(model, "maestro", shrink_every=2, threshold=9.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule.begin(optimizer)
    batch = tiny.batches((2,))[0]
    for _ in range(2):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    schedule.finish()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in tiny.build("llama", num_hidden_layers=1).parameters())  # fmt: skip # noqa: E501


def test_refusals() -> None:
    for settings, message in (
        ({"lasso": -1.0}, "lasso=-1.0.*not negative"),
        ({"threshold": -1.0}, "threshold=-1.0.*not negative"),
        ({"shrink_every": 0}, "a positive number of steps"),
        ({"widths": -1}, "0 for all"),
    ):
        with pytest.raises(ValueError, match=message):
            Maestro(**settings)
    with pytest.raises(ValueError, match="no layer of Sequential is targeted"):
        structure(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "maestro")
    model = toys.mlp(6, 5)
    structure(model, "maestro")
    with pytest.raises(ValueError, match="0 is factored already"):
        structure(model, "maestro")
