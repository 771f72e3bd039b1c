"""Pursuit against the loop that is obviously right, and K-SVD's promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from eckart.linalg.sparse_coding import ksvd_step, learn_dictionary, omp
from eckart.testing import error_ratio, gaussian


def pursued(y: Tensor, D: Tensor, nonzeros: int) -> Tensor:
    """One vector, by the definition: the atom nearest in angle to the residual, then least squares."""
    chosen: list[int] = []
    x = y.new_zeros(D.shape[0])
    for _ in range(nonzeros):
        angles = (D @ (y - x @ D)).abs() / D.norm(dim=1)
        angles[chosen] = -1
        chosen.append(int(angles.argmax()))
        x = y.new_zeros(D.shape[0])
        x[chosen] = torch.linalg.lstsq(D[chosen].T, y[:, None]).solution[:, 0]
    return x


@pytest.mark.parametrize(("k", "d", "nonzeros"), [(8, 8, 3), (20, 9, 9), (5, 12, 5), (6, 6, 1), (1, 3, 1)])
def test_pursuit_is_its_definition(k: int, d: int, nonzeros: int) -> None:
    D, Y = gaussian(k, d, dtype=torch.float64), gaussian(7, d, seed=1, dtype=torch.float64)
    index, values = omp(D @ D.T, Y @ D.T, nonzeros)
    assert index.shape == values.shape == (7, nonzeros)
    found = torch.zeros(7, k, dtype=torch.float64).scatter(1, index, values)
    assert error_ratio(found, torch.stack([pursued(y, D, nonzeros) for y in Y])) <= 1e-8


def test_pursuit_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    D, Y = gaussian(6, 5), gaussian(9, 5, seed=1)
    whole = omp(D @ D.T, Y @ D.T, 3)
    monkeypatch.setattr("eckart.linalg.sparse_coding.CHUNK", 40)
    parts = omp(D @ D.T, Y @ D.T, 3)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


def test_atoms_that_depend_on_others_or_are_zero_do_no_harm() -> None:
    D = torch.cat([gaussian(3, 4, dtype=torch.float64), torch.zeros(1, 4), gaussian(3, 4, dtype=torch.float64)])
    Y = gaussian(5, 4, seed=1, dtype=torch.float64)
    index, values = omp(D @ D.T, Y @ D.T, 7)
    assert torch.equal(index.sort(dim=1).values, torch.arange(7).expand(5, 7))
    found = torch.zeros(5, 7, dtype=torch.float64).scatter(1, index, values)
    best = Y @ torch.linalg.pinv(D[:3]) @ D[:3]
    assert error_ratio(found @ D, best) <= 1e-7


@pytest.mark.parametrize("nonzeros", [-1, 6])
def test_more_entries_than_atoms_are_refused(nonzeros: int) -> None:
    with pytest.raises(ValueError, match=f"cannot choose {nonzeros} of 5 atoms"):
        omp(torch.eye(5), torch.ones(2, 5), nonzeros)


def test_no_entries_and_no_lines() -> None:
    assert omp(torch.eye(5), torch.ones(2, 5), 0)[0].shape == (2, 0)
    assert omp(torch.eye(5), torch.ones(0, 5), 3)[1].shape == (0, 3)


def test_an_atoms_step_keeps_supports_unit_norms_and_never_grows_the_error() -> None:
    Y = gaussian(40, 10, dtype=torch.float64)
    D = torch.nn.functional.normalize(gaussian(12, 10, seed=1, dtype=torch.float64), dim=1)
    index, values = omp(D @ D.T, Y @ D.T, 3)
    X = torch.zeros(40, 12, dtype=torch.float64).scatter(1, index, values)
    support = torch.zeros(40, 12, dtype=torch.bool).scatter(1, index, True)
    rest, before = Y - X @ D, float("inf")
    for _ in range(5):
        ksvd_step(rest, X, support, D)
        assert not X[~support].any()
        torch.testing.assert_close(D.norm(dim=1), torch.ones(12, dtype=torch.float64))
        torch.testing.assert_close(rest, Y - X @ D)
        error = float(rest.square().sum())
        assert error <= before * (1 + 1e-12)
        before = error


@pytest.mark.parametrize(("k", "nonzeros"), [(12, 3), (30, 5), (6, 6)])
def test_learning_never_grows_the_error(k: int, nonzeros: int) -> None:
    Y = gaussian(50, 10, dtype=torch.float64)
    X, support, D, errors = learn_dictionary(Y, k, nonzeros, iterations=12, tolerance=0.0)
    assert torch.equal(support.sum(1), torch.full((50,), nonzeros))
    assert not X[~support].any()
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert float((Y - X @ D).square().sum()) == pytest.approx(errors[-1])
    assert errors[-1] < errors[0] or k == nonzeros


def test_planted_supports_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(gaussian(20, 24, dtype=torch.float64), dim=1)
    support = torch.zeros(400, 20, dtype=torch.bool)
    for row in support:
        row[torch.randperm(20, generator=generator)[:3]] = True
    signs = torch.where(gaussian(400, 20, seed=2) > 0, 1.0, -1.0).double()
    X = support * signs * (1 + gaussian(400, 20, seed=3, dtype=torch.float64).abs())
    _, found, D, _ = learn_dictionary(X @ atoms, 20, 3, iterations=60, tolerance=0.0)
    likeness = (atoms @ D.T).abs()
    order = likeness.argmax(1)
    right = found[:, order] & support
    assert int(right.sum()) > 0.9 * int(support.sum())


def test_lines_of_zeros() -> None:
    X, support, D, errors = learn_dictionary(torch.zeros(9, 5), 4, 2, iterations=5)
    assert not X.any()
    assert torch.equal(support.sum(1), torch.full((9,), 2))
    assert bool(torch.isfinite(D).all())
    assert errors[-1] == 0
