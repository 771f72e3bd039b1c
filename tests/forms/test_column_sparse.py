"""Equally many entries in every column or row: counts, bytes, and pursuit in products."""

from __future__ import annotations

import pytest
import torch

from eckart.forms import ColumnSparse, Dense, RowSparse, parse
from eckart.forms.selections import Magnitude
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import psd_root
from eckart.testing import gaussian


def coupled(n: int, seed: int = 0) -> torch.Tensor:
    X = gaussian(n, 3 * n, seed=seed, dtype=torch.float64)
    return X @ X.T / (3 * n) + torch.ones(n, n)


@pytest.mark.parametrize("shape", [(12, 10), (300, 5), (40, 40), (9, 1), (1, 1)])
@pytest.mark.parametrize("nonzeros", [1, 3, 9])
def test_counts_and_bytes(shape: tuple[int, int], nonzeros: int) -> None:
    W = gaussian(*shape)
    for form, axis in ((ColumnSparse(nonzeros), 0), (RowSparse(nonzeros), 1)):
        length, lines = shape[axis], shape[1 - axis]
        if nonzeros > length:
            with pytest.raises(ValueError, match=f"a line has {length} places"):
                form.fit(W)
            continue
        module = form.fit(W, dtype=torch.float16)
        dense = module.dense().detach()
        assert torch.equal((dense != 0).sum(axis), torch.full((lines,), nonzeros))
        largest = W.half().abs().sort(dim=axis, descending=True).values.narrow(axis, 0, nonzeros)
        assert torch.equal(dense.abs().sort(dim=axis, descending=True).values.narrow(axis, 0, nonzeros), largest)
        index = min(lines * nonzeros * (1 if length <= 256 else 2), lines * ((length + 7) // 8))
        assert module.nbytes == form.nbytes(shape, torch.float16) == 2 * lines * nonzeros + index


def test_columns_are_rows_of_the_transpose() -> None:
    W, G = gaussian(12, 10, dtype=torch.float64), psd_root(coupled(12), 0.0)
    by_columns = ColumnSparse(4).fit(W, Weighting(left=G)).dense()
    by_rows = RowSparse(4).fit(W.T, Weighting(right=G)).dense()
    torch.testing.assert_close(by_columns, by_rows.T)


def test_pursuit_beats_magnitude_under_coupled_weights() -> None:
    W, weighting = gaussian(20, 16, dtype=torch.float64), Weighting(right=psd_root(coupled(16), 0.0))
    for s in (2, 5, 10):
        pursued = weighting.norm2(W - RowSparse(s).fit(W, weighting).dense().detach())
        largest = weighting.norm2(W - RowSparse(s, Magnitude()).fit(W, weighting).dense().detach())
        assert pursued < 0.8 * largest


def test_the_pursued_numbers_are_the_least_squares_ones() -> None:
    W, C = gaussian(6, 8, dtype=torch.float64), coupled(8)
    found = RowSparse(3).fit(W, Weighting(right=psd_root(C, 0.0))).dense().detach()
    for w, x in zip(W, found, strict=True):
        on = x != 0
        best = torch.linalg.solve(C[on][:, on], C[on] @ w)
        torch.testing.assert_close(x[on], best, rtol=1e-8, atol=1e-10)


def test_a_product_with_a_column_sparse_factor_finds_planted_atoms() -> None:
    atoms = gaussian(16, 6, seed=1, dtype=torch.float64)
    codes = torch.zeros(6, 60, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    for column in codes.T:
        column[torch.randperm(6, generator=generator)[:2]] = torch.randn(2, dtype=torch.float64, generator=generator)
    W = atoms @ codes
    form = parse("dense(width=6) @ column_sparse(nonzeros=2)")
    module = form.fit(W)
    assert torch.equal((module.right.dense() != 0).sum(0), torch.full((60,), 2))
    rank_two = float(torch.linalg.svdvals(W)[2:].square().sum())
    assert float((W - module.dense()).detach().square().sum()) < 0.25 * rank_two


def test_open_forms() -> None:
    assert ColumnSparse().open
    assert ColumnSparse().ladder((5, 9))[-1] == ColumnSparse(4)
    assert RowSparse().ladder((5, 9))[-1] == RowSparse(8)
    for form in (ColumnSparse(), RowSparse()):
        with pytest.raises(ValueError, match="has no number of entries yet"):
            form.build((4, 4))
    assert not (Dense(4) @ ColumnSparse(2)).open


def test_an_uneven_bitmap_is_refused() -> None:
    module = RowSparse(4).fit(gaussian(6, 16))
    assert set(module.state_dict()) == {"kept.weight", "bits"}
    bits = module.bits.clone()
    module.bits[0], module.bits[1] = 0b11111111, 0  # 16 places in one row, none in the next
    module.bits[0, 1] = 0
    with pytest.raises(ValueError, match="spread evenly"):
        module.dense()
    module.bits.copy_(bits)
    module.dense()


@pytest.mark.parametrize("nonzeros", [0, -1, "many", 2.5])
def test_refused(nonzeros: int) -> None:
    for form in (ColumnSparse, RowSparse):
        with pytest.raises(ValueError, match=r"nonzeros=.*positive integer"):
            form(nonzeros)
