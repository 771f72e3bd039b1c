"""Weighted k-means: planted clusters, fixed points, monotone errors, weights, corners."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from eckart.linalg import kmeans as module
from eckart.linalg.kmeans import kmeans, nearest
from eckart.testing import error_ratio, gaussian

X = gaussian(300, 3, dtype=torch.float64)
WEIGHTS = gaussian(300, 3, seed=1, dtype=torch.float64).mul(2).exp()


def naive_nearest(X: Tensor, centroids: Tensor, F: Tensor) -> Tensor:
    return (F[:, None] * (X[:, None] - centroids[None]).square()).sum(2).min(1).values


def test_planted_clusters_are_found() -> None:
    centres = 20 * gaussian(16, 3, seed=2)
    points = (centres[:, None] + 0.01 * gaussian(16, 20, 3, seed=3)).flatten(0, 1)
    found = kmeans(points, 16)
    assert len(found.labels.view(16, 20).unique(dim=1)[0]) == 1
    assert sorted(found.labels.view(16, 20)[:, 0].tolist()) == list(range(16))
    assert error_ratio(found.centroids[found.labels], centres.repeat_interleave(20, 0)) < 1e-3


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_end_is_a_fixed_point(weights: Tensor | None) -> None:
    """Every vector with its nearest centroid, every centroid the weighted mean of its vectors, the error as told."""
    found = kmeans(X, 8, weights, steps=500, tolerance=0.0)
    F = torch.ones_like(X) if weights is None else weights
    distances = (F * (X - found.centroids[found.labels]).square()).sum(1)
    assert torch.allclose(distances, naive_nearest(X, found.centroids, F))
    assert found.error == pytest.approx(float(distances.sum()))
    for k in range(8):
        own = found.labels == k
        mean = (F[own] * X[own]).sum(0) / F[own].sum(0)
        assert error_ratio(found.centroids[k], mean) < 1e-9


def test_the_error_never_rises_with_steps_and_falls_with_clusters() -> None:
    by_steps = [kmeans(X, 12, WEIGHTS, steps=n, tolerance=0.0).error for n in range(8)]
    assert all(b <= a for a, b in itertools.pairwise(by_steps))
    assert by_steps[-1] < 0.9 * by_steps[0]
    by_clusters = [kmeans(X, k, WEIGHTS).error for k in (1, 4, 16, 64, 300)]
    assert all(b < 0.8 * a for a, b in itertools.pairwise(by_clusters))
    assert by_clusters[-1] == 0


def test_the_start_is_better_than_any_vectors() -> None:
    """k-means++ on clusters of very different sizes, against vectors drawn evenly."""
    points = torch.cat([gaussian(1000, 3), 100 * gaussian(7, 3, seed=1) + 500])
    F = torch.ones_like(points)
    even = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:16]]
    assert kmeans(points, 16, steps=0).error < 0.1 * float(nearest(points, even, F)[1].sum())


def test_weights_count() -> None:
    weighted, plain = kmeans(X, 8, WEIGHTS, steps=200), kmeans(X, 8, steps=200)
    assert weighted.error < 0.9 * float(naive_nearest(X, plain.centroids, WEIGHTS).sum())
    doubled = kmeans(torch.cat([X, X]), 1).centroids
    assert error_ratio(doubled, X.mean(0, keepdim=True)) < 1e-12
    some = torch.zeros(300, 3, dtype=torch.float64)
    some[:10] = 1
    assert error_ratio(kmeans(X, 1, some).centroids, X[:10].mean(0, keepdim=True)) < 1e-12
    assert bool(torch.isfinite(kmeans(X, 8, torch.zeros_like(X)).centroids).all())


def test_no_cluster_stays_empty() -> None:
    points = torch.cat([torch.zeros(50, 2), gaussian(14, 2)])
    found = kmeans(points, 15, steps=100, tolerance=0.0)
    assert found.error < 1e-8
    assert len(found.labels.unique()) == 15


def test_the_same_seed_gives_the_same_bits_and_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    first = kmeans(X, 8, WEIGHTS, seed=3)
    assert torch.equal(first.centroids, kmeans(X, 8, WEIGHTS, seed=3).centroids)
    assert not torch.equal(first.centroids, kmeans(X, 8, WEIGHTS, seed=4).centroids)
    monkeypatch.setattr(module, "CHUNK", 64)
    assert torch.equal(first.labels, kmeans(X, 8, WEIGHTS, seed=3).labels)


def test_many_vectors_are_seeded_on_some() -> None:
    many = gaussian(6000, 2)
    assert kmeans(many, 4, steps=0).error < 2 * kmeans(many, 4).error


def test_nonsense_is_refused() -> None:
    for k in (0, 301):
        with pytest.raises(ValueError, match="from 1 to 300 clusters"):
            kmeans(X, k)
    with pytest.raises(ValueError, match="do not fit"):
        kmeans(X, 2, WEIGHTS[:, :2])
    assert kmeans(X[:0], 1).centroids.shape == (1, 3)
