"""Unstructured entries: which layout, how many bytes, hostile indices, the fast product, gradients, curves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from eckart.forms import Sparse, parse
from eckart.forms.places import Bitmap, Listed, cheapest
from eckart.forms.products import csr_pays
from eckart.forms.selections import OMP, Magnitude, Wanda
from eckart.forms.sparse import SparseMatrix
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, TriangularRoot
from eckart.testing import error_ratio, gaussian


@pytest.mark.parametrize("shape", [(12, 10), (7, 300), (300, 7), (1, 9), (9, 1), (1, 1), (3, 40000)])
@pytest.mark.parametrize("density", [0.001, 0.04, 0.1, 0.5, 0.97, 1])
def test_keeps_exactly_as_many_as_it_says_and_counts_every_byte(shape: tuple[int, int], density: float) -> None:
    out, in_ = shape
    count = round(density * out * in_)
    W = gaussian(*shape)
    module = Sparse(density).fit(W, dtype=torch.bfloat16)
    assert module.values.shape == (count,)
    assert int((module.dense() != 0).sum()) == count
    column_bytes = 1 if in_ <= 256 else 2 if in_ <= 32768 else 4
    listed, bitmap = count * column_bytes + 4 * (out + 1), out * ((in_ + 7) // 8)
    assert module.nbytes == Sparse(density).nbytes(shape, torch.bfloat16) == 2 * count + min(listed, bitmap)


def test_the_layout_changes_where_it_pays() -> None:
    assert isinstance(cheapest(64, 1024, 64 * 40), Listed)
    assert isinstance(cheapest(64, 1024, 64 * 70), Bitmap)
    assert isinstance(cheapest(64, 200, 64 * 10), Listed)


@pytest.mark.parametrize("density", [0.03, 0.6])
def test_keeps_the_largest_and_keeps_them_as_they_are(density: float) -> None:
    W = gaussian(20, 30)
    dense = Sparse(density).fit(W).dense().detach()
    kept = dense != 0
    assert torch.equal(dense[kept], W[kept])
    assert float(W[~kept].abs().max()) <= float(W[kept].abs().min())


def test_everything_and_nothing() -> None:
    W = gaussian(6, 5)
    assert torch.equal(Sparse(1).fit(W).dense(), W)
    nothing = Sparse(0.001).fit(W)
    assert nothing.values.shape == (0,)
    assert not nothing.dense().any()
    assert torch.equal(nothing(gaussian(3, 5)), torch.zeros(3, 6))


def test_constant_and_zero_rows() -> None:
    W = torch.zeros(6, 8)
    W[1], W[4] = 2.0, 1.0
    dense = Sparse(0.25).fit(W).dense().detach()
    assert torch.equal(dense[1], W[1])
    assert torch.equal(dense[4], torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))  # earlier places win ties
    assert Sparse(0.25).fit(torch.zeros(6, 8)).values.shape == (12,)  # as many places, though all are zero


def test_is_the_best_choice_where_errors_do_not_couple() -> None:
    W, rows, columns = gaussian(5, 4), gaussian(5, seed=1).abs() + 0.1, gaussian(4, seed=2).abs() + 0.1
    weighting = Weighting(DiagonalRoot(rows), DiagonalRoot(columns))
    lost = (W * rows[:, None] * columns).square().flatten().sort().values
    for count in (1, 7, 19):
        error = weighting.norm2(W - Sparse(count / 20).fit(W, weighting).dense().detach())
        assert error == pytest.approx(float(lost[: 20 - count].sum()), rel=1e-5)
    each = Weighting(each=gaussian(5, 4, seed=3).square() + 0.01)
    assert each.each is not None
    lost = (each.each * W.square()).flatten().sort().values
    error = each.norm2(W - Sparse(0.35).fit(W, each).dense().detach())
    assert error == pytest.approx(float(lost[:13].sum()), rel=1e-5)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(1,), (2, 3), (40,), ()])
def test_the_product_by_rows_is_that_of_the_dense_matrix(
    density: float, dtype: torch.dtype, batch: tuple[int, ...]
) -> None:
    shape = (33, 47)
    module = Sparse(density).fit(gaussian(*shape, dtype=dtype)).requires_grad_(False)
    x, bias = gaussian(*batch, 47, seed=1, dtype=dtype), gaussian(33, seed=2, dtype=dtype)
    assert csr_pays(x, shape, module.values.shape[0]) == (density < 0.3)
    for b in (None, bias):
        assert error_ratio(module(x, b), F.linear(x, module.dense(), b)) <= 1e-6


def test_gradients_reach_the_values_and_only_the_kept_places() -> None:
    module = Sparse(0.2).fit(gaussian(6, 8, dtype=torch.float64))
    x, g = gaussian(5, 8, seed=1, dtype=torch.float64), gaussian(5, 6, seed=2, dtype=torch.float64)
    module(x).backward(g)
    wanted = (g.T @ x).flatten()[module.flat()]
    assert module.kept.weight.grad is not None
    assert error_ratio(module.kept.weight.grad.view(-1), wanted) <= 1e-12


def listed() -> SparseMatrix:
    module = Sparse(0.02).fit(gaussian(20, 100))
    assert set(module.state_dict()) == {"kept.weight", "index", "starts"}
    return module


def spoiled(name: str, at: int, value: int) -> SparseMatrix:
    module = listed()
    getattr(module, name)[at] = value
    return module


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("index", 0, 250, "outside its 100 places"),
        ("starts", 0, 1, "do not begin in order between 0 and 40"),
        ("starts", -1, 41, "do not begin in order"),
        ("starts", 3, 2**30, "do not begin in order"),
        ("starts", 3, -5, "do not begin in order"),
    ],
)
def test_hostile_indices_are_refused(name: str, at: int, value: int, message: str) -> None:
    module = spoiled(name, at, value)
    for use in (module.dense, lambda: module(torch.ones(1, 100)), lambda: module.rows(torch.tensor([0]))):
        with pytest.raises(ValueError, match=message), torch.no_grad():
            use()


def test_repeated_columns_are_refused() -> None:
    module = Sparse(0.02).fit(torch.ones(2, 100))
    module.index[1] = module.index[0]
    with pytest.raises(ValueError, match="do not ascend"):
        module.dense()


def test_a_bitmap_with_other_places_than_values_is_refused() -> None:
    module = Sparse(0.5).fit(gaussian(8, 16))
    assert set(module.state_dict()) == {"kept.weight", "bits"}
    module.bits[0, 0] ^= 1
    with pytest.raises(ValueError, match=r"marks 6[35] places for 64 entries"):
        module.dense()


def test_bits_beyond_the_width_do_not_matter() -> None:
    module = Sparse(0.5).fit(gaussian(8, 13))
    before = module.dense().detach().clone()
    module.bits[:, -1] |= 0b11100000
    assert torch.equal(module.dense(), before)


def test_the_ladder_climbs_and_its_curve_tells_the_errors_of_the_fits() -> None:
    W = gaussian(40, 64)
    for form in (Sparse(), Sparse(selection=Wanda())):
        curve = form.curve(W, PLAIN, torch.float16)
        assert curve.nbytes == sorted(curve.nbytes)
        assert all(a >= b for a, b in zip(curve.errors, curve.errors[1:], strict=False))
        assert curve.energy == pytest.approx(float(W.square().sum()), rel=1e-5)
        for closed, nbytes, error in zip(curve.forms, curve.nbytes, curve.errors, strict=True):
            assert nbytes == closed.nbytes((40, 64), torch.float16)
            found = PLAIN.norm2(W - closed.fit(W, dtype=torch.float16).dense().detach().float())
            assert error == pytest.approx(found, rel=0.1, abs=2e-3 * curve.energy)


def test_text() -> None:
    assert str(Sparse(0.05, Magnitude())) == "sparse(density=0.05, selection=magnitude())"
    assert parse("sparse(density=0.05, selection=obs(block=64, per_row=True))").open is False
    assert parse("low_rank(rank=2) + sparse()").open is True


def test_the_term_of_a_sum_finds_what_low_rank_leaves() -> None:
    W = gaussian(24, 1, seed=1) @ gaussian(1, 20, seed=2)
    W[3, 4], W[10, 11], W[20, 1] = 30.0, -25.0, 20.0
    both = parse("low_rank(rank=1) + sparse(density=0.00625)").fit(W)
    assert error_ratio(both.dense(), W) <= 1e-3
    assert both.terms[1].flat().tolist() == [3 * 20 + 4, 10 * 20 + 11, 20 * 20 + 1]


@pytest.mark.parametrize("density", [0, -0.1, 1.2, True, "half", float("nan")])
def test_refused_densities(density: object) -> None:
    with pytest.raises(ValueError, match=r"sparse\(density=.*above 0, up to 1"):
        Sparse(density)  # type: ignore[arg-type]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="has no density yet"):
        Sparse().fit(gaussian(3, 4))
    with pytest.raises(ValueError, match="that is no selection"):
        parse("sparse(density=0.5, selection=uniform())")
    with pytest.raises(ValueError, match="is a selection, and stands only as a setting of a form"):
        parse("magnitude()")
    with pytest.raises(ValueError, match=r"omp\(\) needs a form with a fixed number"):
        Sparse(0.5, OMP()).fit(gaussian(3, 4), Weighting(right=TriangularRoot(torch.eye(4))))
