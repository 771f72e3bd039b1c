"""The closed forms of MoDeGPT against the obvious way to compute each."""

from __future__ import annotations

import itertools

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg import pairs
from eckart.linalg.whitening import Damped


def data(rows: int, width: int, seed: int = 0) -> Float[Tensor, "rows width"]:
    """Correlated rows of uneven size with a mean, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return x @ mix * torch.logspace(0, -1.5, width, dtype=torch.float64) + 0.3


def weight(out: int, in_: int, seed: int = 1) -> Float[Tensor, "out in"]:
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nystrom_is_least_squares_on_the_kept_activations() -> None:
    a, W = data(400, 24).relu(), weight(10, 24)
    C = a.T @ a / len(a)
    found = pairs.nystrom(W, C, 9)
    best = torch.linalg.lstsq(a[:, found.index], a @ W.T).solution.T
    assert torch.allclose(found.right, best, rtol=1e-6, atol=1e-6 * float(best.abs().max()))
    error = (a @ W.T - a[:, found.index] @ found.right.T).square().sum() / len(a)
    assert found.error == pytest.approx(float(error), rel=1e-6)
    assert found.energy == pytest.approx(float((a @ W.T).square().sum()) / len(a), rel=1e-9)


def test_nystrom_is_better_than_unchanged_columns_and_than_random_units() -> None:
    a, W = data(400, 24).relu(), weight(10, 24)
    C = a.T @ a / len(a)
    found = pairs.nystrom(W, C, 9)
    assert found.error < 0.9 * pairs.restricted_error(W, W[:, found.index], found.index, C)
    generator = torch.Generator().manual_seed(0)
    others = []
    for _ in range(20):
        index = torch.randperm(24, generator=generator)[:9].sort().values
        right = torch.linalg.lstsq(a[:, index], a @ W.T).solution.T
        others.append(pairs.restricted_error(W, right, index, C))
    assert found.error < sum(others) / len(others)


def test_leverage_is_the_ridge_definition() -> None:
    C = data(200, 12).T @ data(200, 12) / 200
    ridge = 1e-2 * C.diagonal().mean() * torch.eye(12, dtype=C.dtype)
    assert torch.allclose(pairs.leverage(C, 1e-2, "w"), (C @ torch.linalg.inv(C + ridge)).diagonal(), atol=1e-10)


def test_all_units_leave_the_matrix_as_it_was_even_where_the_moment_is_singular() -> None:
    a, W = data(5, 16), weight(6, 16)
    assert torch.equal(pairs.nystrom(W, a.T @ a / 5, 16).right, W)


def test_a_moment_that_rounding_made_indefinite_is_damped_and_said() -> None:
    a, W = data(5, 16), weight(6, 16)
    C = a.T @ a / 5
    C -= 1e-6 * C.diagonal().mean() * torch.eye(16, dtype=C.dtype)
    with pytest.warns(Damped, match="the kept inputs of down is rank-deficient: damped by 1e-0"):
        found = pairs.nystrom(W, C, 9, name="down")
    assert found.error < 1e-4 * found.energy


def test_nystrom_says_what_is_wrong() -> None:
    W = weight(4, 6)
    C = data(50, 6).T @ data(50, 6) / 50
    for width in (0, 7):
        with pytest.raises(ValueError, match=f"down: cannot keep {width} of 6 units"):
            pairs.nystrom(W, C, width, name="down")
    with pytest.raises(ValueError, match="the input of down is zero on all calibration data"):
        pairs.nystrom(W, torch.zeros(6, 6), 3, name="down")
    with pytest.raises(ValueError, match="down holds NaN"):
        pairs.nystrom(W, C * torch.nan, 3, name="down")


@pytest.mark.parametrize("paired", [[(0, 3), (1, 4), (2, 5)], [(0, 2), (1, 3)], []])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 6])
def test_coordinates_are_the_best_set_that_splits_no_pair(paired: list[tuple[int, int]], width: int) -> None:
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    whole = [s for s in itertools.combinations(range(6), width) if all((i in s) == (j in s) for i, j in paired)]
    if not whole:
        with pytest.raises(ValueError, match=f"cannot keep {width} of 6 coordinates"):
            pairs.strongest_coordinates(scores, paired, width)
        return
    found = pairs.strongest_coordinates(scores, paired, width)
    totals = torch.stack([scores[:, list(s)].sum(1) for s in whole], 1)
    best = [whole[i] for i in totals.argmax(1).tolist()]
    assert found.index.tolist() == [list(s) for s in best]
    kept = sum(float(row[list(s)].sum()) for row, s in zip(scores, best, strict=True))
    assert found.error == pytest.approx(float(scores.sum()) - kept, abs=1e-12)


def test_no_coordinates_is_an_error() -> None:
    with pytest.raises(ValueError, match="heads: cannot keep 0 of 6"):
        pairs.strongest_coordinates(torch.ones(1, 6), [], 0, "heads")


@pytest.mark.parametrize("heads", [1, 3])
def test_product_is_the_papers_two_svds(heads: int) -> None:
    """SVD(C^{1/2} W_vᵀ) = U S Zᵀ, SVD(S Zᵀ W_oᵀ) = U2 S2 Z2ᵀ, values (C^{-1/2} U U2_k)ᵀ, outputs (S2 Z2ᵀ)_kᵀ."""
    x, V, O = data(300, 20), weight(6, 20), weight(20 * heads, 6, 2)
    C = x.T @ x / len(x)
    values, Q = torch.linalg.eigh(C)
    root, inverse = Q * values.sqrt() @ Q.T, Q / values.sqrt() @ Q.T
    U, S, Zh = torch.linalg.svd(root @ V.T, full_matrices=False)
    U2, S2, Z2h = torch.linalg.svd(S[:, None] * Zh @ O.T, full_matrices=False)
    found = pairs.truncated_product(O, V, C, 4)
    paper = (S2[:4, None] * Z2h[:4]).T @ (inverse @ U @ U2[:, :4]).T
    assert torch.allclose(found.left @ found.right, paper, rtol=1e-6, atol=1e-8)
    assert torch.allclose(found.squares, S2.square(), rtol=1e-8)
    error = (x @ (O @ V - found.left @ found.right).T).square().sum() / len(x)
    assert float(error) == pytest.approx(float(S2[4:].square().sum()), rel=1e-6)
    assert pairs.product_error(O, V, found.left, found.right, C) == pytest.approx(float(error), rel=1e-6)


def test_full_product_is_exact_also_where_rows_depend_on_each_other() -> None:
    V, O, C = weight(6, 20), weight(12, 6, 2), torch.eye(20, dtype=torch.float64)
    V[4], V[5] = V[0] - V[1], 0
    found = pairs.truncated_product(O, V, C, 6)
    assert found.right.shape == (6, 20)
    assert torch.equal(found.right[4:], torch.zeros(2, 20, dtype=torch.float64))
    assert torch.allclose(found.left @ found.right, O @ V, atol=1e-10)


def test_no_width_of_a_product_is_an_error() -> None:
    with pytest.raises(ValueError, match="attn: cannot keep 0 of 6 coordinates"):
        pairs.truncated_product(weight(12, 6), weight(6, 20), torch.eye(20), 0, "attn")
