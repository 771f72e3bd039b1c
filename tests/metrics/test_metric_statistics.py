"""Sums over data: padding left out, counts kept, gradients per example, and sums that add up whatever the dtype."""

from __future__ import annotations

import pytest
import torch

from eckart.linalg.whitening import Damped
from eckart.metrics import InputCovariance, Statistics
from eckart.metrics.statistics import FLOAT64_WIDTH, INPUT_SUMS
from eckart.testing import error_ratio, gaussian

GRADIENTS = frozenset({"fisher_in", "fisher_out", "grad_outer"})


def test_padding_is_left_out() -> None:
    x = gaussian(4, 6, 5)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 0])[:, None]
    padded = torch.where(mask[..., None], x, torch.nan)
    found, wanted = Statistics(), Statistics()
    found.add_inputs(padded, INPUT_SUMS, mask)
    wanted.add_inputs(x[mask], INPUT_SUMS)
    assert found.tokens == wanted.tokens == 10
    assert found.sums.keys() == wanted.sums.keys() == INPUT_SUMS | {"tokens"}
    for name, value in wanted.sums.items():
        assert torch.equal(found.sums[name], value)


def test_sums_are_what_their_names_say() -> None:
    x = gaussian(7, 5).double()
    statistics = Statistics()
    statistics.add_inputs(x, INPUT_SUMS)
    wanted = {"x": x.mean(0), "abs": x.abs().mean(0), "square": x.square().mean(0), "outer": x.T @ x / 7}
    for name, value in wanted.items():
        assert error_ratio(statistics.mean(name), value) <= 1e-6


def test_only_what_is_needed_is_summed() -> None:
    statistics = Statistics()
    statistics.add_inputs(gaussian(7, 5), frozenset({"abs"}))
    statistics.add_gradients(gaussian(7, 5), gaussian(7, 3), frozenset({"grad_outer"}))
    assert statistics.sums.keys() == {"tokens", "abs", "examples", "grad_tokens", "grad_outer"}


@pytest.mark.parametrize("needs", [INPUT_SUMS, frozenset({"x"})])
def test_a_batch_of_padding_alone_counts_nothing(needs: frozenset[str]) -> None:
    statistics = Statistics()
    statistics.add_inputs(gaussian(2, 3, 5), needs, torch.zeros(2, 3, dtype=torch.bool))
    assert statistics.tokens == 0
    with pytest.raises(ValueError, match="lm_head has no statistics 'x': calibrate on data that reaches it"):
        statistics.mean("x", "lm_head")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_is_summed_in_float32_or_wider(dtype: torch.dtype) -> None:
    x = (100 + gaussian(4096, 3)).to(dtype)
    statistics = Statistics()
    statistics.add_inputs(x, INPUT_SUMS)
    assert error_ratio(statistics.mean("outer"), x.double().T @ x.double() / len(x)) <= 1e-5
    assert all(value.dtype == torch.float64 for value in statistics.sums.values())


def test_very_wide_outer_products_stay_in_float32() -> None:
    statistics = Statistics()
    statistics.add_inputs(gaussian(1, FLOAT64_WIDTH + 1), frozenset({"outer", "x"}))
    assert statistics.sums["outer"].dtype == torch.float32
    assert statistics.sums["x"].dtype == torch.float64


def test_gradients_are_squared_example_by_example() -> None:
    x, g = gaussian(4, 6, 5), gaussian(4, 6, 3, seed=1)
    statistics = Statistics()
    for inputs, gradients in zip(x, g, strict=True):
        statistics.add_gradients(inputs, gradients, GRADIENTS)
    weight = torch.zeros(3, 5, requires_grad=True)
    squared = torch.zeros(3, 5)
    for e in range(4):
        (gradient,) = torch.autograd.grad((g[e] * (x[e] @ weight.T)).sum(), weight)
        squared += gradient.square()
    assert error_ratio(statistics.sums["fisher_in"], squared.sum(0)) <= 1e-6
    assert error_ratio(statistics.sums["fisher_out"], squared.sum(1)) <= 1e-6
    assert error_ratio(statistics.mean("fisher_in"), squared.sum(0) / 4) <= 1e-6
    rows = g.flatten(0, 1)
    assert error_ratio(statistics.mean("grad_outer"), rows.T @ rows / 24) <= 1e-6


def test_merging_leaves_the_other_shard_alone() -> None:
    one, other, empty = Statistics(), Statistics(), Statistics()
    one.add_inputs(gaussian(7, 5), INPUT_SUMS)
    other.add_inputs(gaussian(3, 5, seed=1), INPUT_SUMS)
    before = {name: value.clone() for name, value in other.sums.items()}
    empty.merge(other)
    empty.merge(one)
    empty.add_inputs(gaussian(2, 5), INPUT_SUMS)
    assert empty.tokens == 12
    assert all(torch.equal(other.sums[name], value) for name, value in before.items())


def test_too_few_tokens_are_said() -> None:
    with pytest.warns(Damped, match="up_proj saw 3 tokens for 8 inputs: its covariance is rank-deficient"):
        InputCovariance().of(gaussian(3, 8), "up_proj")
