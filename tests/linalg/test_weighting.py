"""The norm || Lᵀ M R ||, what a factor of a product does to it, and least squares in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.linalg.weighting import PLAIN, Weighting, weighted_lstsq_left, weighted_lstsq_right
from eckart.linalg.whitening import DiagonalRoot, psd_root
from eckart.testing import error_ratio, gaussian

OUT, IN, K = 7, 9, 4


def covariance(n: int, rank: int, seed: int) -> Tensor:
    X = gaussian(n, rank, seed=seed, dtype=torch.float64)
    return X @ X.T


G, C = covariance(OUT, 20, 1), covariance(IN, 20, 2)
DIAGONAL = Weighting(DiagonalRoot(G.diagonal().sqrt()), DiagonalRoot(C.diagonal().sqrt()))
WEIGHTINGS: dict[str, tuple[Weighting, Tensor, Tensor]] = {
    "plain": (PLAIN, torch.eye(OUT, dtype=torch.float64), torch.eye(IN, dtype=torch.float64)),
    "cholesky": (Weighting(psd_root(G, 0.0), psd_root(C, 0.0)), G, C),
    "eigen": (Weighting(psd_root(G, 0.0, "eigen"), psd_root(C, 0.0, "eigen")), G, C),
    "diagonal": (DIAGONAL, torch.diag(G.diagonal()), torch.diag(C.diagonal())),
    "one side": (Weighting(right=psd_root(C, 0.0)), torch.eye(OUT, dtype=torch.float64), C),
}
weightings = pytest.mark.parametrize("name", WEIGHTINGS)


def norm2(M: Tensor, G: Tensor, C: Tensor) -> float:
    """tr(G M C Mᵀ), naively."""
    return float((G @ M @ C * M).sum())


@weightings
def test_norm_is_the_trace(name: str) -> None:
    weighting, G, C = WEIGHTINGS[name]
    M = gaussian(OUT, IN, seed=3)
    assert weighting.norm2(M) == pytest.approx(norm2(M.double(), G, C), rel=1e-10)
    assert float(weighting.apply(M.double()).square().sum()) == pytest.approx(weighting.norm2(M), rel=1e-10)
    assert weighting.norm2(M.clone().requires_grad_()) == weighting.norm2(M)


@weightings
def test_the_left_root_is_undone(name: str) -> None:
    weighting = WEIGHTINGS[name][0]
    M = gaussian(OUT, K, seed=3, dtype=torch.float64)
    weighted = weighting.left.times(M.T).T
    assert error_ratio(weighting.unapply_left(weighted), M) <= 1e-10


@weightings
def test_a_factor_carries_the_norm_to_the_other(name: str) -> None:
    weighting, G, C = WEIGHTINGS[name]
    A, B = gaussian(OUT, K, seed=4, dtype=torch.float64), gaussian(K, IN, seed=5, dtype=torch.float64)
    X, Y = gaussian(OUT, K, seed=6, dtype=torch.float64), gaussian(K, IN, seed=7, dtype=torch.float64)
    assert weighting.through_left(A).norm2(Y) == pytest.approx(norm2(A @ Y, G, C), rel=1e-9)
    assert weighting.through_right(B).norm2(X) == pytest.approx(norm2(X @ B, G, C), rel=1e-9)


@weightings
@pytest.mark.parametrize("rank", [2, K])
def test_least_squares_leaves_no_gradient(name: str, rank: int) -> None:
    weighting, G, C = WEIGHTINGS[name]
    W = gaussian(OUT, IN, seed=3, dtype=torch.float64)
    A = gaussian(OUT, rank, seed=4, dtype=torch.float64) @ gaussian(rank, K, seed=5, dtype=torch.float64)
    B = gaussian(K, rank, seed=6, dtype=torch.float64) @ gaussian(rank, IN, seed=7, dtype=torch.float64)
    start_X, start_Y = gaussian(OUT, K, seed=8), gaussian(K, IN, seed=9)
    Y = weighted_lstsq_right(A, W, weighting, start_Y)
    X = weighted_lstsq_left(B, W, weighting, start_X)
    assert float((A.T @ G @ (W - A @ Y)).norm()) <= 1e-9 * float((A.T @ G @ W).norm())
    assert float(((W - X @ B) @ C @ B.T).norm()) <= 1e-9 * float((W @ C @ B.T).norm())


def test_least_squares_leaves_alone_what_it_cannot_see() -> None:
    W = gaussian(OUT, IN, seed=3, dtype=torch.float64)
    A, near = torch.zeros(OUT, K, dtype=torch.float64), gaussian(K, IN, seed=9, dtype=torch.float64)
    assert torch.equal(weighted_lstsq_right(A, W, PLAIN, near), near)
    A[:, 0] = 1
    A[:, 1] = 1e-12 * gaussian(OUT, seed=1, dtype=torch.float64)  # far below what rounding of a stored factor leaves
    Y = weighted_lstsq_right(A, W, PLAIN, near, damping=1e-4)
    assert error_ratio(Y[0], W.mean(0)) <= 1e-6
    assert error_ratio(Y[2:], near[2:]) <= 1e-9
    assert error_ratio(Y[1], near[1]) <= 1e-2
