"""Means, shared directions and matchings, against explicit ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from eckart.linalg.union import matched_rows, union_basis, weighted_mean
from eckart.testing import error_ratio, gaussian


def test_the_mean_by_shares() -> None:
    stack, shares = gaussian(3, 4, 5), torch.tensor([1.0, 0.0, 3.0])
    assert error_ratio(weighted_mean(stack, shares), (stack[0] + 3 * stack[2]).double() / 4) < 1e-6
    assert error_ratio(weighted_mean(stack, torch.zeros(3)), stack.double().mean(0)) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_basis_is_that_of_the_concatenation(rank: int) -> None:
    stack, X = gaussian(3, 6, 5, dtype=torch.float64), gaussian(3, 5, 3, seed=1, dtype=torch.float64)
    for roots, grams in (([torch.eye(5, dtype=torch.float64)] * 3, None), (list(X), [x @ x.T for x in X])):
        joined = torch.cat([w @ r for w, r in zip(stack, roots, strict=True)], dim=1)
        U = torch.linalg.svd(joined).U[:, :rank]
        found = union_basis(stack, rank, grams)
        assert error_ratio(found @ found.T, U @ U.T) < 1e-9  # grams of rank 3 are no obstacle
        assert error_ratio(found.T @ found, torch.eye(rank, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("rank", [0, 7])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 6 directions"):
        union_basis(gaussian(2, 6, 5), rank)


@pytest.mark.parametrize("seed", range(3))
def test_the_matching_is_the_best_of_all(seed: int) -> None:
    rows, like = gaussian(5, 3, seed=seed), gaussian(5, 3, seed=seed + 50)

    def product(order: tuple[int, ...]) -> float:
        return float((rows[list(order)] * like).sum())

    found = tuple(matched_rows(rows, like).tolist())
    assert product(found) == pytest.approx(max(product(p) for p in itertools.permutations(range(5))), rel=1e-5)


def test_a_permutation_is_found_again() -> None:
    rows = gaussian(40, 30)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rows[order][matched_rows(rows[order], rows)], rows)
