"""Fast rotations: orthogonal, what their matrices say, and without entries that stand out."""

from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch

from eckart.linalg.dct import dct_basis
from eckart.linalg.rotation import hadamard, sizes, turned
from eckart.testing import gaussian


def signs(n: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))
    return (2 * drawn - 1).double()


@pytest.mark.parametrize("n", [1, 2, 8, 64, 256])
def test_sylvesters_matrix(n: int) -> None:
    wanted = torch.from_numpy(scipy.linalg.hadamard(n)).double() / math.sqrt(n)
    torch.testing.assert_close(hadamard(n, torch.float64), wanted, rtol=0, atol=1e-16)


@pytest.mark.parametrize("n", [0, 3, 12, -2])
def test_no_power_of_two(n: int) -> None:
    with pytest.raises(ValueError, match=f"power of two rows, not {n}"):
        hadamard(n)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 12, 96, 128, 384, 704, 1024])
def test_orthogonal_spread_and_undone(n: int) -> None:
    S, eye = signs(n), torch.eye(n, dtype=torch.float64)
    H = turned(eye, S)
    torch.testing.assert_close(H @ H.T, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned(H, S, back=True), eye, rtol=0, atol=1e-12)
    assert n == 0 or float(H.abs().max()) <= math.sqrt(2 / n) + 1e-12
    x = gaussian(2, 3, n)
    torch.testing.assert_close(turned(turned(x, S.float()), S.float(), back=True), x, rtol=0, atol=3e-6)


@pytest.mark.parametrize("n", [6, 96, 384, 1024])
def test_as_the_kronecker_product_says(n: int) -> None:
    K = torch.ones(1, 1, dtype=torch.float64)
    for size in sizes(n):
        K = torch.kron(K, (dct_basis if size % 2 else hadamard)(size, torch.float64))
    x = gaussian(5, n, dtype=torch.float64)
    torch.testing.assert_close(turned(x, signs(n)), (x * signs(n)) @ K)


def test_many_small_matrices_stand_for_a_wide_one() -> None:
    assert sizes(4096) == [64, 64]
    assert sizes(704) == [64, 11]
    assert sizes(384) == [8, 16, 3]
    assert all(math.prod(sizes(n)) == n for n in range(1, 500))
