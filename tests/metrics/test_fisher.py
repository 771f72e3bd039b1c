"""The Fisher information of single weights: per example, and its stand-in on two sides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.forms import LowRank, Quantized
from eckart.forms.levels import Learned
from eckart.metrics import Fisher, Statistics
from eckart.testing import error_ratio, gaussian

OUT, IN = 10, 12
W = gaussian(OUT, IN, seed=1, dtype=torch.float64)


def weighting(F: Tensor, damping: float = 1e-5):  # type: ignore[no-untyped-def]
    return Fisher(damping).weighting(Statistics({"fisher": 7 * F, "examples": torch.tensor(7.0)}))


def test_gradients_are_squared_example_by_example() -> None:
    x, g = gaussian(2, 5, IN), gaussian(2, 5, OUT, seed=1)
    apart, together = Statistics(), Statistics()
    for inputs, gradients in zip(x, g, strict=True):
        apart.add_gradients(inputs, gradients, Fisher.needs)
    together.add_gradients(x, g, Fisher.needs)
    wanted = sum((b.T @ a).square() for a, b in zip(x, g, strict=True))
    assert error_ratio(apart.sums["fisher"], wanted) <= 1e-6
    assert error_ratio(together.sums["fisher"], wanted) > 0.1
    assert error_ratio(apart.sums["fisher_in"], wanted.sum(0)) <= 1e-6


def test_the_norm_counts_every_error_by_itself() -> None:
    F = gaussian(OUT, IN, seed=2, dtype=torch.float64).square() + 0.1
    assert weighting(F).norm2(W) == pytest.approx(float((F * W.square()).sum()))
    assert error_ratio(weighting(F).importance((OUT, IN)), F) <= 1e-12


def test_on_a_product_of_rows_and_columns_two_sides_are_exact() -> None:
    u, v = (gaussian(n, seed=n, dtype=torch.float64).square() + 0.1 for n in (OUT, IN))
    found = weighting(torch.outer(u, v))
    rebuilt = torch.outer(found.left.gram(OUT).diagonal(), found.right.gram(IN).diagonal())
    assert error_ratio(rebuilt, torch.outer(u, v)) <= 1e-12
    tail = torch.linalg.svdvals(torch.outer(u, v).sqrt() * W)[3:].square().sum()
    low = LowRank(3).fit(W, found).dense().detach()
    assert found.norm2(W - low) == pytest.approx(float(tail), rel=1e-9)
    assert found.norm2(W - LowRank(3).fit(W).dense().detach()) > 1.01 * float(tail)


def test_quantisers_heed_it() -> None:
    F = gaussian(40, 60, seed=2, dtype=torch.float64) ** 4
    M = gaussian(40, 60, seed=3, dtype=torch.float64)
    norm, form = weighting(F), Quantized(2, None, Learned())
    assert norm.norm2(M - form.fit(M, norm).dense().detach()) < 0.7 * norm.norm2(M - form.fit(M).dense().detach())


def test_dead_weights_are_damped() -> None:
    F = torch.ones(OUT, IN)
    F[2] = 0
    found = weighting(F, 0.01)
    assert found.each is not None
    assert float(found.each[2].min()) == pytest.approx(0.01 * float(F.mean()))
    assert bool((weighting(0 * F).each == 1).all())
