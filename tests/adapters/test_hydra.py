"""Hydra: two branches that are one matrix, of which one recombines what the layer knows and the other adds to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lone import fitted, gaussian, lone, update_of
from torch import nn

from eckart import adapters
from eckart.testing.adapters import near

BASES = {"linear": lambda: nn.Linear(10, 12), "conv1x1": lambda: nn.Conv2d(10, 12, 1), "plain": lambda: nn.Linear(10, 12, False)}  # fmt: skip # noqa: E501


def inputs(base: str) -> torch.Tensor:
    return gaussian(3, 10, 4, 5) if base == "conv1x1" else gaussian(3, 10)


def stirred(layer: Any) -> Any:
    """The layer with an update away from its start."""
    with torch.no_grad():
        for k, p in enumerate(p for p in layer.parameters() if p.requires_grad):
            p += 0.3 * gaussian(*p.shape, seed=k)
    return layer.eval()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("biases", [False, True])
def test_it_starts_exactly_and_merges_with_the_bias(base: str, biases: bool) -> None:
    layer, x = lone("hydra", BASES[base](), biases=biases, scale=0.7), inputs(base)
    assert torch.equal(layer(x), layer.base_layer(x))
    before = stirred(layer)(x)
    layer.merge()
    assert near(layer(x), before)
    layer.unmerge()
    assert torch.equal(layer(x), before)
    assert (layer.base_layer.bias is None) == (base == "plain")


def test_the_branch_behind_sees_the_frozen_output_alone() -> None:
    layer = stirred(lone("hydra", nn.Linear(10, 12), scale=0.7))
    one, two, x, W, b = layer.updates["default"].parallel, layer.updates["default"].sequential, inputs("linear"), layer.host.weight(), layer.host.bias()  # fmt: skip # noqa: E501
    y0 = x @ W.T + b
    assert near(layer(x), y0 + 0.7 * (x @ one.A.T @ one.B.T + y0 @ two.A.T @ two.B.T))
    behind = torch.eye(12) + 0.7 * two.B @ two.A
    assert near(W + update_of(layer).delta(layer.host), behind @ W + 0.7 * one.B @ one.A)
    assert near(b + update_of(layer).bias_delta(layer.host), behind @ b)


def test_without_one_branch_it_is_lora_or_a_transform_of_the_output() -> None:
    lora = stirred(lone("hydra", nn.Linear(10, 12), rank=3, sequential_rank=0))
    assert sum(p.numel() for p in lora.parameters() if p.requires_grad) == 3 * (10 + 12)
    one = update_of(lora).parallel
    assert torch.equal(update_of(lora).delta(lora.host), one.B @ one.A)
    assert update_of(lora).bias_delta(lora.host) is None
    behind = stirred(lone("hydra", gaussian(12, 10), rank=0, sequential_rank=3))
    delta, W, B = update_of(behind).delta(behind.host), behind.host.weight(), update_of(behind).sequential.B
    assert near(delta - B @ torch.linalg.pinv(B) @ delta, torch.zeros(()))
    assert near(delta - delta @ torch.linalg.pinv(W) @ W, torch.zeros(()))


def test_gradients_of_the_branch_behind_are_those_of_the_formula() -> None:
    layer, x, g = lone("hydra", nn.Linear(10, 12)), gaussian(7, 10), gaussian(7, 12, seed=1)
    two, y0 = update_of(layer).sequential, layer.base_layer(x).detach()
    (layer(x) * g).sum().backward()
    assert not two.A.grad.any()
    assert near(two.B.grad, g.T @ (y0 @ two.A.T))
    layer.zero_grad()
    stirred(layer)
    (layer(x) * g).sum().backward()
    assert near(two.A.grad, two.B.T @ g.T @ y0)


def test_changes_inside_the_row_space_are_the_sequential_branchs_and_others_the_parallel_ones() -> None:
    W = gaussian(12, 4) @ gaussian(4, 10, seed=1)
    recombined = W + 0.3 * gaussian(12, 2, seed=2) @ gaussian(2, 12, seed=3) @ W
    outside = gaussian(1, 10, seed=4) @ (torch.eye(10) - torch.linalg.pinv(W) @ W)
    added = W + gaussian(12, 1, seed=5) @ outside
    assert fitted(lone("hydra", W, rank=0, sequential_rank=2), recombined) < 1e-4
    assert fitted(lone("hydra", W, rank=2, sequential_rank=0), added) < 1e-4
    assert fitted(lone("hydra", W, rank=0, sequential_rank=12), added, steps=50) > 0.99
    many = W + 0.3 * gaussian(12, 12, seed=6) @ W
    assert fitted(lone("hydra", W, rank=1, sequential_rank=0), many) > 0.1
    assert fitted(lone("hydra", W, rank=0, sequential_rank=4), many) < 1e-4


@pytest.mark.parametrize("biases", [False, True])
def test_it_trains_as_many_numbers_as_the_formula_says(biases: bool) -> None:
    layer = lone("hydra", nn.Linear(10, 12), rank=2, sequential_rank=5, biases=biases)
    count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert count == 2 * (10 + 12) + 2 * 5 * 12 + (2 + 12 + 5 + 12 if biases else 0)


def test_dropout_reaches_both_branches() -> None:
    for ranks in ({"rank": 0}, {"sequential_rank": 0}):
        layer, x = stirred(lone("hydra", nn.Linear(10, 12), dropout=0.5, **ranks)), inputs("linear")
        still = layer(x)
        torch.manual_seed(0)
        assert not near(layer.train()(x), still)
        assert torch.equal(layer.eval()(x), still)


def test_bad_settings_and_places_are_refused() -> None:
    with pytest.raises(ValueError, match="rank=-1"):
        lone("hydra", nn.Linear(10, 12), rank=-1)
    with pytest.raises(ValueError, match="no branch at all"):
        lone("hydra", nn.Linear(10, 12), rank=0, sequential_rank=0)
    with pytest.raises(ValueError, match="0: sequential_rank 13"):
        lone("hydra", nn.Linear(10, 12), sequential_rank=13)
    with pytest.raises(ValueError, match=r"out_proj belongs to an nn.MultiheadAttention"):
        adapters.adapt(nn.Sequential(nn.MultiheadAttention(8, 2)), "hydra", target_modules=["out_proj"])
