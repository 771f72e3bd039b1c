"""Weighted k-means for vectors: Lloyd's iterations from a k-means++ start; every coordinate has its own weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 1 << 22
"""Distances that are in memory at once."""
SEEDED_ON = 8
"""Vectors for each centroid on which k-means++ draws, of many at random."""


class Clusters(NamedTuple):
    """Centroids (k, d), the cluster of every vector (n,), and the weighted sum of squared distances."""

    centroids: Float[Tensor, "k d"]
    labels: Int[Tensor, " n"]
    error: float


@torch.no_grad()
def kmeans(
    X: Float[Tensor, "n d"],
    k: int,
    weights: Float[Tensor, "n d"] | None = None,
    *,
    seed: int = 0,
    steps: int = 50,
    tolerance: float = 1e-3,
) -> Clusters:
    """Centroids c and labels with a small sum of weights (x - c)² (Lloyd, 1982; Arthur and Vassilvitskii, 2007).

    The error never rises from step to step. A cluster that loses all its vectors takes the one that is farthest from
    its centroid. With as many centroids as vectors the error is zero.

    Args:
        X: (n, d), finite.
        k: from 1 to n.
        weights: (n, d), not negative; all one where not given. Coordinates without any weight keep what they started
            with.
        seed: of the start. The same seed gives the same bits.
        steps: most iterations; fewer once a step gains less than `tolerance` of the error.

    Raises `ValueError` where k or the shapes are impossible.
    """
    n, d = X.shape
    if not 1 <= k <= max(1, n):
        raise ValueError(f"{n} vectors have from 1 to {n} clusters; {k} were asked for")
    if weights is not None and weights.shape != X.shape:
        raise ValueError(f"weights of shape {tuple(weights.shape)} do not fit vectors of shape {(n, d)}")
    if n == 0:
        return Clusters(X.new_zeros(k, d), torch.zeros(0, dtype=torch.int64, device=X.device), 0.0)
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    F = torch.ones_like(X) if weights is None else weights.to(X)
    centroids = X.clone() if k == n else _start(X, F, k, torch.Generator().manual_seed(seed))
    labels, distances = nearest(X, centroids, F)
    error = float(distances.double().sum())
    for _ in range(steps):
        moved = _moved(X, F, labels, distances, centroids)
        labels_after, distances = nearest(X, moved, F)
        after = float(distances.double().sum())
        if after > error:  # rounding: nothing is left to gain
            break
        gained, centroids, labels, error = error - after, moved, labels_after, after
        if gained <= tolerance * error:
            break
    return Clusters(centroids, labels, error)


def nearest(
    X: Float[Tensor, "n d"], centroids: Float[Tensor, "k d"], weights: Float[Tensor, "n d"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The nearest centroid of every vector under its own weights, and the distance to it."""
    labels, distances = [], []
    both = torch.cat([centroids.square(), -2 * centroids], dim=1).T
    size = max(1, CHUNK // len(centroids))
    for x, f in zip(X.split(size), weights.split(size), strict=True):
        found = (torch.cat([f, f * x], dim=1) @ both).argmin(1)
        labels.append(found)
        distances.append((f * (x - centroids[found]).square()).sum(1))  # not from the product, which cancels
    return torch.cat(labels), torch.cat(distances)


def _start(X: Tensor, F: Tensor, k: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """k-means++: each next centroid is a vector drawn in proportion to its distance from those before."""
    n = len(X)
    if n > SEEDED_ON * k + 4096:
        at = torch.randperm(n, generator=generator)[: SEEDED_ON * k + 4096].to(X.device)
        X, F = X[at], F[at]
    left = F.sum(1)
    chosen: list[int] = []
    for _ in range(k):
        shares = left.double().cumsum(0).cpu()
        drawn = torch.rand((), generator=generator, dtype=torch.float64) * shares[-1]
        i = min(int(torch.searchsorted(shares, drawn, right=True)), len(X) - 1)
        if shares[-1] <= 0:  # all that counts is met: spread what is over
            i = len(chosen) * len(X) // k
        chosen.append(i)
        near = (F * (X - X[i]).square()).sum(1)
        left = near if len(chosen) == 1 else torch.minimum(left, near)
    return X[chosen].clone()


def _moved(X: Tensor, F: Tensor, labels: Tensor, distances: Tensor, centroids: Tensor) -> Float[Tensor, "k d"]:
    """The weighted mean of every cluster; of an empty one, a vector that is far from where it belongs."""
    k = len(centroids)
    total = torch.zeros_like(centroids, dtype=torch.float64).index_add_(0, labels, F.double())
    sums = torch.zeros_like(total).index_add_(0, labels, (F * X).double())
    moved = torch.where(total > 0, sums / total.clamp_min(1e-300), centroids.double()).to(centroids.dtype)
    empty = (torch.bincount(labels, minlength=k) == 0).nonzero()[:, 0]
    far = distances.sort(descending=True, stable=True).indices[: len(empty)]
    far = far[distances[far] > 0]
    moved[empty[: len(far)]] = X[far]
    return moved
