"""Factors that are not negative: their signs, errors that never grow, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from eckart.linalg.nonnegative import nmf, semi_nmf
from eckart.testing import error_ratio, gaussian


def test_semi_nmf_keeps_one_factor_non_negative_and_never_grows() -> None:
    A = gaussian(18, 12, seed=2, dtype=torch.float64)
    X, Y, errors = semi_nmf(A, 4, iterations=60, generator=torch.Generator().manual_seed(0))
    assert bool((X >= 0).all())
    assert bool((Y < 0).any())
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]
    assert errors[-1] == pytest.approx(float((A - X @ Y).square().sum()))


def test_nmf_keeps_both_factors_non_negative_and_never_grows() -> None:
    A = gaussian(18, 4, seed=2, dtype=torch.float64).abs() @ gaussian(4, 12, seed=3, dtype=torch.float64).abs()
    X, Y, errors = nmf(A, 4, iterations=200, generator=torch.Generator().manual_seed(0))
    assert bool((X >= 0).all() & (Y >= 0).all())
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    assert error_ratio(X @ Y, A) < 0.05
    with pytest.raises(ValueError, match=r"\d+ of 216 entries are negative"):
        nmf(-A, 4, iterations=2, generator=torch.Generator().manual_seed(0))
