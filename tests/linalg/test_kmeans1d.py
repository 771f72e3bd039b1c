"""Weighted k-means on a line against brute force, a plain dynamic programme, and itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from eckart.linalg.kmeans1d import kmeans1d, nearest
from eckart.testing import gaussian


def cost(x: Tensor, weight: Tensor, centres: Tensor) -> Tensor:
    return (weight * (x[..., None] - centres[..., None, :]).square().amin(-1)).sum(-1)


def best_cost(x: Tensor, weight: Tensor, k: int) -> float:
    """The least cost of one short row, over all ways to cut it."""
    order = x.argsort()
    x, weight = x[order], weight[order]
    least = float("inf")
    for inner in itertools.combinations(range(1, len(x)), k - 1):
        total = 0.0
        for a, b in itertools.pairwise((0, *inner, len(x))):
            mean = (weight[a:b] * x[a:b]).sum() / weight[a:b].sum()
            total += float((weight[a:b] * (x[a:b] - mean).square()).sum())
        least = min(least, total)
    return least


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_short_rows_are_exact(k: int) -> None:
    x, weight = gaussian(6, 12, dtype=torch.float64), gaussian(6, 12, seed=1, dtype=torch.float64).square()
    found = cost(x, weight, kmeans1d(x, k, weight))
    wanted = torch.tensor([best_cost(x[i], weight[i], k) for i in range(6)], dtype=torch.float64)
    assert torch.allclose(found, wanted, rtol=1e-9)


def test_long_rows_are_near_the_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    x = gaussian(4, 400, dtype=torch.float64) ** 3
    weight = gaussian(4, 400, seed=1, dtype=torch.float64) ** 4
    fast = cost(x, weight, kmeans1d(x, 8, weight))
    monkeypatch.setattr("eckart.linalg.kmeans1d.EXACT", 400)
    exact = cost(x, weight, kmeans1d(x, 8, weight))
    assert bool((exact <= fast * (1 + 1e-9)).all())
    assert bool((fast <= 1.03 * exact).all())


@pytest.mark.parametrize("k", [16, 64, 256])
def test_error_falls_with_many_clusters(k: int) -> None:
    x = gaussian(3, 1000, seed=2)
    ones = torch.ones_like(x)
    fewer, more = (cost(x, ones, kmeans1d(x, n)) for n in (k // 2, k))
    assert bool((more < 0.4 * fewer).all())


def test_weights_matter() -> None:
    x, weight = gaussian(8, 300), gaussian(8, 300, seed=1) ** 4
    weighted, plain = kmeans1d(x, 4, weight), kmeans1d(x, 4)
    assert bool((cost(x, weight, weighted) < cost(x, weight, plain)).all())
    assert torch.allclose(kmeans1d(x, 4, 7 * weight), weighted)
    assert torch.allclose(kmeans1d(x, 4, torch.zeros_like(x)), plain)


def test_few_different_points_are_met_exactly() -> None:
    x = torch.tensor([[1.0, 1.0, 3.0, 3.0, -2.0], [5.0] * 5])
    for k in (3, 4, 8):
        centres = kmeans1d(x, k)
        assert centres.shape == (2, k)
        assert float(cost(x, torch.ones_like(x), centres).max()) <= 1e-10


def test_centres_ascend_and_any_order_is_looked_up() -> None:
    x = gaussian(2, 3, 50)
    centres = kmeans1d(x, 5)
    assert bool((centres.diff(dim=-1) >= 0).all())
    turned = centres.flip(-1)
    found = turned.gather(-1, nearest(x, turned))
    assert torch.equal(found, centres.gather(-1, nearest(x, centres)))
    assert torch.allclose((x - found).abs(), (x[..., None] - centres[..., None, :]).abs().amin(-1))


def test_nothing_to_cluster() -> None:
    assert kmeans1d(torch.zeros(3, 0), 4).shape == (3, 4)
    assert kmeans1d(torch.zeros(0, 5), 4).shape == (0, 4)
    with pytest.raises(ValueError, match="at least one cluster"):
        kmeans1d(torch.zeros(3, 5), 0)
