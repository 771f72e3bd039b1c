"""Roots of weights: what they multiply to, what they undo, and what happens where there is no root."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from eckart.linalg.whitening import (
    Damped,
    DiagonalRoot,
    EigenRoot,
    IdentityRoot,
    Root,
    TriangularRoot,
    check_finite,
    damped_diagonal,
    psd_root,
)
from eckart.testing import error_ratio, gaussian

N = 9


def covariance(rank: int = N, seed: int = 1) -> Tensor:
    X = gaussian(N, rank if rank < N else 3 * N, seed=seed, dtype=torch.float64)
    return X @ X.T


D = gaussian(N, seed=2, dtype=torch.float64).abs() + 0.1
ROOTS: dict[str, tuple[Root, Tensor]] = {
    "identity": (IdentityRoot(), torch.eye(N, dtype=torch.float64)),
    "diagonal": (DiagonalRoot(D), torch.diag(D**2)),
    "cholesky": (psd_root(covariance(), 0.0), covariance()),
    "eigen": (psd_root(covariance(), 0.0, "eigen"), covariance()),
}


@pytest.mark.parametrize("name", ROOTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_root_squares_to_its_weight_and_is_undone(name: str, dtype: torch.dtype) -> None:
    root, C = ROOTS[name]
    M = gaussian(4, N, seed=3, dtype=dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    S = root.times(torch.eye(N, dtype=torch.float64))
    assert error_ratio(S @ S.T, C) <= 1e-12
    assert error_ratio(root.gram(N), C) <= 1e-12
    assert root.gram(N).dtype == torch.float64
    assert root.times(M).dtype == root.over(M).dtype == dtype
    assert error_ratio(root.times(M), M.double() @ S) <= tolerance
    assert error_ratio(root.over(root.times(M)), M) <= tolerance


def test_kinds_of_roots() -> None:
    assert [type(root) for root, _ in ROOTS.values()] == [IdentityRoot, DiagonalRoot, TriangularRoot, EigenRoot]


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_eigen_root_of_a_singular_weight_is_exact(rank: int) -> None:
    C = covariance(rank)
    root = psd_root(C, 0.0, "eigen")
    assert isinstance(root, EigenRoot)
    assert root.Q.shape == (N, rank)
    assert error_ratio(root.gram(N), C) <= 1e-12
    S, M = root.times(torch.eye(N, dtype=torch.float64)), gaussian(4, rank, seed=3, dtype=torch.float64)
    assert error_ratio(root.over(M), M @ torch.linalg.pinv(S)) <= 1e-8


def test_damping_is_relative_to_the_mean_diagonal() -> None:
    C = covariance()
    for scale in (1e-9, 1.0, 1e9):
        wanted = scale * (C + 0.01 * C.diagonal().mean() * torch.eye(N, dtype=torch.float64))
        assert error_ratio(psd_root(scale * C, 0.01).gram(N), wanted) <= 1e-10
        assert error_ratio(psd_root(scale * C, 0.01, "eigen").gram(N), wanted) <= 1e-10


def test_more_damping_than_asked_for_is_said() -> None:
    with pytest.warns(Damped, match=r"the covariance of up_proj is rank-deficient: damped by 1e-\d\d of its mean"):
        root = psd_root(covariance(3), 0.0, name="up_proj")
    assert isinstance(root, TriangularRoot)
    assert error_ratio(root.gram(N), covariance(3)) <= 1e-6


def test_enough_damping_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        psd_root(covariance(3), 1e-6)
        psd_root(covariance(3), 0.0, "eigen")


def test_rounding_that_breaks_symmetry_is_forgiven() -> None:
    C = covariance()
    skewed = C + 1e-9 * gaussian(N, N, dtype=torch.float64)
    assert error_ratio(psd_root(skewed, 0.0).gram(N), C) <= 1e-8


@pytest.mark.parametrize("kind", ["cholesky", "eigen"])
def test_a_weight_of_nothing_weighs_everything_the_same(kind: str) -> None:
    assert isinstance(psd_root(torch.zeros(N, N), kind=kind), IdentityRoot)  # type: ignore[arg-type]
    assert isinstance(psd_root(torch.zeros(0, 0), kind=kind), IdentityRoot)  # type: ignore[arg-type]
    assert torch.equal(damped_diagonal(torch.zeros(N), 1e-4), torch.ones(N, dtype=torch.float64))
    assert damped_diagonal(torch.zeros(0), 1e-4).shape == (0,)


def test_a_weight_that_is_none_is_refused() -> None:
    C = covariance()
    indefinite = C - 2 * C.diagonal().max() * torch.eye(N) + torch.diag(4 * C.diagonal())
    indefinite[0, 1] = indefinite[1, 0] = 1e6
    with pytest.raises(ValueError, match="the covariance of up_proj is not positive semi-definite"):
        psd_root(indefinite, name="up_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_named(value: float) -> None:
    broken = covariance()
    broken[2, 3] = value
    with pytest.raises(ValueError, match="the covariance of up_proj holds NaN or infinity"):
        psd_root(broken, name="up_proj")
    with pytest.raises(ValueError, match="the diagonal weight of up_proj holds NaN or infinity"):
        damped_diagonal(broken[2], 0.0, "up_proj")
    with pytest.raises(ValueError, match=r"^my tensor holds NaN or infinity$"):
        check_finite(broken, "my tensor")


def test_dead_entries_of_a_diagonal_are_lifted() -> None:
    d = torch.tensor([0.0, 1.0, 3.0, 4.0])
    assert damped_diagonal(d, 0.1).tolist() == pytest.approx([0.2, 1.0, 3.0, 4.0])
    with pytest.raises(ValueError, match="a diagonal weight needs positive entries; damp it first"):
        DiagonalRoot(d)
