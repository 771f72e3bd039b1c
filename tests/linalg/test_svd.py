from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.linalg import svd
from eckart.linalg.svd import TruncatedSVD, singular_values, truncated_svd

ROUTES = ("auto", "gram", "exact", "randomized")
SHAPES = [(1, 1), (1, 9), (9, 1), (16, 16), (70, 24), (24, 70), (3, 500)]


def gaussian(m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(m: int, n: int, S: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix (m, n) with the singular values S."""
    k = len(S)
    U = torch.linalg.qr(gaussian(m, k, seed, torch.float64))[0]
    V = torch.linalg.qr(gaussian(n, k, seed + 1, torch.float64))[0]
    return (U * S.double()) @ V.mT


def residual(A: Tensor, found: TruncatedSVD) -> float:
    return float((A.double() - (found.U.double() * found.S.double()) @ found.Vh.double()).norm())


def optimal_error(A: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(A.double())[rank:].norm())


def assert_valid(A: Tensor, found: TruncatedSVD, rank: int, tolerance: float = 1e-5) -> None:
    """Shapes, orthonormality, order, signs, and an error that is the true residual."""
    m, n = A.shape
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((m, rank), (rank,), (rank, n))
    identity = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(found.U.double().mT @ found.U.double(), identity, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.Vh.double() @ found.Vh.double().mT, identity, atol=tolerance, rtol=0)
    assert (found.S >= 0).all()
    assert (found.S.diff() <= 0).all()
    if rank and m:
        assert (found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) > 0).all()
    whole = float(A.double().norm())
    assert found.error == pytest.approx(residual(A, found), rel=1e-3, abs=1e-6 * whole)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_is_optimal_at_every_rank(shape: tuple[int, int], route: str, dtype: torch.dtype) -> None:
    A = gaussian(*shape, dtype=dtype)
    for rank in {1, min(shape) // 2, min(shape)}:
        found = truncated_svd(A, rank, route=route)
        assert_valid(A, found, rank, tolerance=40 * torch.finfo(dtype).eps)
        assert found.S.dtype == dtype
        rounding = 20 * torch.finfo(dtype).eps * float(A.norm())
        assert residual(A, found) <= 1.0005 * optimal_error(A, rank) + rounding


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty_matrix(shape: tuple[int, int]) -> None:
    found = truncated_svd(torch.zeros(shape))
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((shape[0], 0), (0,), (0, shape[1]))
    assert found.error == 0.0
    assert singular_values(torch.zeros(shape)).shape == (0,)


def test_rank_zero_keeps_nothing_and_misses_everything() -> None:
    A = 7 * gaussian(5, 3)
    found = truncated_svd(A, 0)
    assert_valid(A, found, 0)
    assert found.error == pytest.approx(float(A.norm()))


@pytest.mark.parametrize("route", ROUTES)
def test_zero_matrix_has_orthonormal_factors(route: str) -> None:
    A = torch.zeros(6, 4)
    found = truncated_svd(A, 3, route=route)
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(3))
    torch.testing.assert_close(found.Vh @ found.Vh.mT, torch.eye(3))
    assert found.S.tolist() == [0, 0, 0]
    assert found.error == 0.0


@pytest.mark.parametrize("route", ROUTES)
def test_exactly_low_rank_matrix(route: str) -> None:
    A = with_spectrum(90, 40, torch.tensor([5.0, 3.0, 2.0])).float()
    at_rank, beyond = truncated_svd(A, 3, route=route), truncated_svd(A, 10, route=route)
    for found, rank in ((at_rank, 3), (beyond, 10)):
        assert_valid(A, found, rank)
        assert found.error <= 1e-6 * float(A.norm())
        torch.testing.assert_close(found.S[:3], torch.tensor([5.0, 3.0, 2.0]), rtol=1e-5, atol=0)
    assert float(beyond.S[3]) <= 1e-6 * 5.0


def test_repeated_columns_and_zero_rows_keep_orthonormal_factors() -> None:
    A = gaussian(30, 10)
    A[:, 5:] = A[:, :5]
    A[:20] = 0
    assert_valid(A, truncated_svd(A), 10)


def test_full_rank_reproduces_the_matrix_to_rounding() -> None:
    A = with_spectrum(300, 200, torch.arange(1.0, 201.0) ** -0.6).float()
    found = truncated_svd(A)
    assert_valid(A, found, 200)
    assert found.error <= 20 * torch.finfo(torch.float32).eps * float(A.norm())


def test_small_error_is_measured_rather_than_cancelled() -> None:
    S = torch.cat([torch.ones(8), torch.full((8,), 1e-4)])
    A = with_spectrum(60, 16, S).float()
    found = truncated_svd(A, 8)
    assert found.error == pytest.approx(1e-4 * math.sqrt(8), rel=1e-2)
    assert found.error == pytest.approx(residual(A, found), rel=1e-3)


@pytest.mark.parametrize("smallest", [0.3, 1e-2, 5e-3, 1e-3, 1e-4, 1e-6])
def test_factors_stay_optimal_where_a_float32_gram_matrix_is_lost(smallest: float) -> None:
    S = torch.cat([torch.ones(1), smallest * torch.arange(0.01, 3.0, 0.01) ** -0.5])
    A = with_spectrum(500, 300, S).float()
    found = truncated_svd(A, 150)
    assert_valid(A, found, 150)
    assert residual(A, found) <= 1.0005 * optimal_error(A, 150) + 1e-7 * float(A.norm())
    if smallest >= 1e-3:
        torch.testing.assert_close(found.S.double(), torch.linalg.svdvals(A.double())[:150], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("orders", "accuracy"), [(7, 1e-7), (12, 5e-3)])
def test_spectrum_over_many_orders_of_magnitude(orders: int, accuracy: float) -> None:
    S = torch.logspace(0, -orders, 40, dtype=torch.float64)
    A = with_spectrum(120, 40, S)
    found = truncated_svd(A, purpose="spectrum")
    assert found.route == "exact"
    torch.testing.assert_close(found.S, S, rtol=accuracy, atol=0)
    torch.testing.assert_close(singular_values(A), S, rtol=accuracy, atol=0)
    assert_valid(A, found, 40, tolerance=1e-12)


def test_spectrum_stays_on_the_gram_route_while_it_resolves_the_tail() -> None:
    S = torch.logspace(0, -4.5, 40, dtype=torch.float64)
    A = with_spectrum(120, 40, S)
    found = truncated_svd(A, purpose="spectrum")
    assert found.route == "gram"
    torch.testing.assert_close(found.S, S, rtol=1e-6, atol=0)
    torch.testing.assert_close(singular_values(A), S, rtol=1e-5, atol=0)


@pytest.mark.parametrize("decades", [3, 8, 12])
def test_spectrum_of_float32_input_is_at_least_as_accurate_as_lapack(decades: int) -> None:
    A = with_spectrum(120, 40, torch.logspace(0, -decades, 40)).float()
    truth = torch.linalg.svdvals(A.double())
    ours = singular_values(A)
    assert ours.dtype == torch.float64
    assert float((ours - truth).abs().max()) <= 1e-7 * float(truth[0])
    clear = truth > 1e-5 * truth[0]
    torch.testing.assert_close(ours[clear], truth[clear], rtol=1e-5, atol=0)
    kept = truncated_svd(A, purpose="spectrum").S.double()
    assert float((kept - truth).abs().max()) <= 2e-7 * float(truth[0])


def test_routes_agree_down_to_the_signs() -> None:
    A = with_spectrum(150, 100, 0.8 ** torch.arange(100.0)).float()
    exact = truncated_svd(A, 6, route="exact")
    for route in ("gram", "randomized"):
        other = truncated_svd(A, 6, route=route)
        assert other.route == route
        torch.testing.assert_close(other.S, exact.S, rtol=1e-4, atol=0)
        torch.testing.assert_close(other.U, exact.U, rtol=0, atol=1e-3)
        torch.testing.assert_close(other.Vh, exact.Vh, rtol=0, atol=1e-3)
        assert other.error == pytest.approx(exact.error, rel=5e-4)


def test_wide_matrix_is_the_transposed_problem() -> None:
    A = with_spectrum(80, 30, 0.7 ** torch.arange(30.0)).float()
    tall, wide = truncated_svd(A, 5), truncated_svd(A.mT, 5)
    torch.testing.assert_close(tall.S, wide.S)
    torch.testing.assert_close((tall.U * tall.S) @ tall.Vh, ((wide.U * wide.S) @ wide.Vh).mT, rtol=0, atol=1e-5)


def test_auto_takes_the_randomised_route_only_for_small_ranks_of_large_matrices() -> None:
    A = with_spectrum(1100, 1024, torch.arange(1.0, 401.0) ** -0.5).float()
    found = truncated_svd(A, 12)
    assert found.route == "randomized"
    assert_valid(A, found, 12)
    assert found.error <= 1.0005 * float((torch.arange(13.0, 401.0) ** -1).sum().sqrt())
    assert truncated_svd(A[:300, :100], 9).route == "gram"
    assert truncated_svd(A, 12, purpose="spectrum").route == "gram"


def test_randomised_route_falls_back_when_it_cannot_converge() -> None:
    A = with_spectrum(200, 150, torch.linspace(1, 0.9, 150)).float()
    found = truncated_svd(A, 10, route="randomized")
    assert found.route == "gram"
    assert residual(A, found) <= 1.0005 * optimal_error(A, 10)


@pytest.mark.parametrize("kind", ["slow", "gaussian", "plateau", "outliers", "steep"])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_randomised_route_delivers_the_error_it_promises(kind: str, rank: int) -> None:
    i = torch.arange(1.0, 241.0)
    A = {
        "slow": lambda: with_spectrum(300, 240, i**-0.3),
        "gaussian": lambda: gaussian(300, 240),
        "plateau": lambda: with_spectrum(300, 240, 1.0 + 3.0 * (i < 8) + 0.2 * (i < 60)),
        "outliers": lambda: with_spectrum(300, 240, i**-0.3 + 30.0 * (i < 4)),
        "steep": lambda: with_spectrum(300, 240, torch.exp(-i / 12) + 1e-3),
    }[kind]().float()
    found = truncated_svd(A, rank, route="randomized", seed=3)
    assert residual(A, found) <= 1.0005 * optimal_error(A, rank)
    assert found.error == pytest.approx(residual(A, found), rel=1e-3)


def test_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    A = gaussian(200, 150)
    first = truncated_svd(A, 5, route="randomized", seed=1)
    assert first.route == "randomized"
    again = truncated_svd(A, 5, route="randomized", seed=1)
    other = truncated_svd(A, 5, route="randomized", seed=2)
    assert torch.equal(first.U, again.U)
    assert torch.equal(first.Vh, again.Vh)
    assert not torch.equal(first.U, other.U)
    assert torch.equal(truncated_svd(A, 5).U, truncated_svd(A, 5, seed=9).U)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    truncated_svd(gaussian(60, 50), 3, route="randomized")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 2.0**100), (torch.float32, 2.0**-130), (torch.float64, 2.0**-1000)]
)
def test_squares_of_extreme_entries_neither_overflow_nor_vanish(dtype: torch.dtype, scale: float) -> None:
    A = torch.randint(-8, 9, (20, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, scaled = truncated_svd(A, 4), truncated_svd(A * scale, 4)
    torch.testing.assert_close(scaled.S / scale, plain.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled.U, plain.U, rtol=0, atol=1e-5)
    assert scaled.error / scale == pytest.approx(plain.error, rel=1e-5)
    torch.testing.assert_close(singular_values(A * scale) / scale, singular_values(A), rtol=1e-5, atol=0)


def test_largest_float32_is_not_mistaken_for_infinity() -> None:
    A = torch.diag(torch.tensor([torch.finfo(torch.float32).max, 1e38]))
    assert float(singular_values(A)[0]) == pytest.approx(torch.finfo(torch.float32).max, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_on_in_float32(dtype: torch.dtype) -> None:
    A = gaussian(40, 30, dtype=dtype)
    found, wide = truncated_svd(A, 7), truncated_svd(A.float(), 7)
    assert found.U.dtype == found.S.dtype == found.Vh.dtype == torch.float32
    assert torch.equal(found.U, wide.U)


def test_no_gradient_flows_and_the_input_is_untouched() -> None:
    A = gaussian(12, 9).requires_grad_()
    before = A.detach().clone()
    found = truncated_svd(A, 4)
    assert not found.U.requires_grad
    assert torch.equal(A.detach(), before)


def test_lapack_failure_is_retried_on_the_triangular_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    A = gaussian(30, 12)
    expected, true_svd, calls = truncated_svd(A, 5, route="exact"), torch.linalg.svd, []

    def fails_once(M: Tensor, **settings: bool) -> object:
        calls.append(M.shape)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return true_svd(M, **settings)

    monkeypatch.setattr(torch.linalg, "svd", fails_once)
    found = truncated_svd(A, 5, route="exact")
    assert len(calls) == 2
    torch.testing.assert_close(found.U, expected.U, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.Vh, expected.Vh, rtol=0, atol=1e-5)


def test_eigensolver_failure_leads_to_the_exact_route(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    A = gaussian(30, 12)
    expected = torch.linalg.svdvals(A.double())
    monkeypatch.setattr(torch.linalg, "eigh", fails)
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    assert truncated_svd(A, 5).route == "exact"
    torch.testing.assert_close(singular_values(A), expected)


def test_lower_gram_matches_the_whole_product_across_blocks() -> None:
    A = gaussian(9, 11, dtype=torch.float64)
    torch.testing.assert_close(svd._lower_gram(A, block=4).tril(), (A.mT @ A).tril())


@pytest.mark.parametrize(
    ("A", "arguments", "error", "message"),
    [
        (torch.ones(3), {}, ValueError, "needs a matrix, not a tensor of shape \\(3,\\)"),
        (torch.ones(2, 2, 2), {}, ValueError, "needs a matrix"),
        (torch.ones(2, 2, dtype=torch.int64), {}, TypeError, "floating-point numbers, not torch.int64"),
        (torch.ones(2, 2, dtype=torch.complex64), {}, TypeError, "floating-point numbers, not torch.complex64"),
        (torch.tensor([[1.0, math.nan]]), {}, ValueError, "shape \\(1, 2\\) holds 1 NaN and 0 infinite"),
        (torch.tensor([[math.inf, -math.inf]]), {}, ValueError, "holds 0 NaN and 2 infinite"),
        (torch.ones(4, 3), {"rank": 4}, ValueError, "ranks from 0 to 3; 4 was asked for"),
        (torch.ones(4, 3), {"rank": -1}, ValueError, "ranks from 0 to 3; -1 was asked for"),
        (torch.ones(0, 3), {"rank": 1}, ValueError, "ranks from 0 to 0; 1 was asked for"),
        (torch.ones(4, 3), {"purpose": "speed"}, ValueError, "not 'speed'"),
        (torch.ones(4, 3), {"route": "power"}, ValueError, "not 'power'"),
        (torch.ones(4, 3), {"route": "randomized", "purpose": "spectrum"}, ValueError, "decide an allocation"),
    ],
)
def test_bad_input_is_named(A: Tensor, arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        truncated_svd(A, **arguments)


def test_singular_values_refuses_what_the_decomposition_refuses() -> None:
    with pytest.raises(ValueError, match="1 NaN"):
        singular_values(torch.tensor([[math.nan, 1.0]]))
    with pytest.raises(TypeError, match="int64"):
        singular_values(torch.ones(2, 2, dtype=torch.int64))


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(0, 12),
    n=st.integers(0, 12),
    share=st.floats(0, 1),
    true_rank=st.integers(0, 12),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    purpose=st.sampled_from(["factors", "spectrum"]),
)
def test_any_shape_and_true_rank(
    m: int, n: int, share: float, true_rank: int, seed: int, dtype: torch.dtype, purpose: str
) -> None:
    A = (gaussian(m, true_rank, seed, torch.float64) @ gaussian(true_rank, n, seed + 1, torch.float64)).to(dtype)
    rank = round(share * min(m, n))
    found = truncated_svd(A, rank, purpose=purpose)
    assert_valid(A, found, rank)
    whole = float(A.double().norm())
    truth = torch.linalg.svdvals(A.double())
    assert residual(A, found) <= 1.0005 * float(truth[rank:].norm()) + 2e-6 * whole
    torch.testing.assert_close(singular_values(A), truth, rtol=1e-5, atol=1e-7 * max(whole, 1e-30))
