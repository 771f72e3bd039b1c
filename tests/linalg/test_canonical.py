"""CP by alternating least squares: exact where it can be, never growing, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from eckart.linalg.canonical import cp_als, cp_dense
from eckart.testing import gaussian


def test_alternating_least_squares_recover_a_sum_of_rank_one_tensors_and_never_grow() -> None:
    generator = torch.Generator().manual_seed(0)
    sides = [gaussian(n, 3, seed=n, dtype=torch.float64) for n in (6, 5, 4, 3)]
    T = cp_dense(sides)
    torch.testing.assert_close(T, torch.einsum("ar,br,cr,dr->abcd", *sides))
    factors, error = cp_als(T, 3, iterations=500, generator=generator)
    assert error < 1e-9 * float(T.square().sum())
    torch.testing.assert_close(cp_dense(factors), T, rtol=1e-3, atol=1e-4)
    noise = gaussian(5, 4, 3, seed=9, dtype=torch.float64)
    errors = [cp_als(noise, 2, iterations=n, generator=torch.Generator().manual_seed(1))[1] for n in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ValueError, match="the rank is positive"):
        cp_als(T, 0, generator=generator)
