"""The best factors of a rank in any two-sided norm: against brute force, against the spectrum, on singular weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.forms import LowRank
from eckart.forms.low_rank import balance
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, IdentityRoot, psd_root
from eckart.testing import error_ratio, gaussian

OUT, IN = 12, 16
W = gaussian(OUT, IN, seed=1, dtype=torch.float64)


def covariance(n: int, rank: int | None = None, seed: int = 0) -> Tensor:
    """Of correlated variables with very different scales; singular if a rank below n is given."""
    scales = torch.logspace(0, -2, n, dtype=torch.float64)[:, None]
    X = scales * gaussian(n, rank or 3 * n, seed=seed, dtype=torch.float64)
    return X @ X.T


def truncated(M: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


WEIGHTS_OUT, WEIGHTS_IN = gaussian(OUT, seed=2).abs() + 0.1, gaussian(IN, seed=3).abs() + 0.1
WEIGHTINGS = {
    "plain": PLAIN,
    "right cholesky": Weighting(right=psd_root(covariance(IN), 0.0)),
    "both cholesky": Weighting(psd_root(covariance(OUT, seed=1), 0.0), psd_root(covariance(IN), 0.0)),
    "both eigen": Weighting(psd_root(covariance(OUT, seed=1), 0.0, "eigen"), psd_root(covariance(IN), 0.0, "eigen")),
    "diagonal": Weighting(DiagonalRoot(WEIGHTS_OUT), DiagonalRoot(WEIGHTS_IN)),
    "left only": Weighting(psd_root(covariance(OUT, seed=1), 0.0), IdentityRoot()),
}


@pytest.mark.parametrize("rank", [1, 5, 11, 12])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_is_the_brute_force_optimum(name: str, rank: int) -> None:
    weighting = WEIGHTINGS[name]
    # any pair of square roots gives the same optimum: take Cholesky's, whatever the weighting itself uses
    L = torch.linalg.cholesky(weighting.left.gram(OUT))
    R = torch.linalg.cholesky(weighting.right.gram(IN))
    weighted = L.T @ W @ R
    optimum = torch.linalg.inv(L.T) @ truncated(weighted, rank) @ torch.linalg.inv(R)
    fitted = LowRank(rank).fit(W, weighting).dense().detach()
    assert error_ratio(fitted, optimum) <= 1e-7
    tail = float(torch.linalg.svdvals(weighted)[rank:].square().sum())
    whole = weighting.norm2(W)
    assert weighting.norm2(W - fitted) == pytest.approx(tail, rel=1e-6, abs=1e-12 * whole)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_curve_tells_the_errors_of_the_fits(name: str) -> None:
    weighting = WEIGHTINGS[name]
    curve = LowRank().curve(W, weighting, torch.float16)
    assert [form.rank for form in curve.forms] == [1, 2, 3, 4, 5, 6]
    assert curve.nbytes == [2 * (OUT + IN) * rank for rank in (1, 2, 3, 4, 5, 6)]
    assert curve.energy == pytest.approx(weighting.norm2(W), rel=1e-9)
    for form, nbytes, error in zip(curve.forms, curve.nbytes, curve.errors, strict=True):
        fitted = form.fit(W, weighting)
        assert error == pytest.approx(weighting.norm2(W - fitted.dense().detach()), rel=1e-6)
        assert nbytes == form.nbytes((OUT, IN), torch.float16)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_singular_weight_is_never_inverted(side: str) -> None:
    n = IN if side == "right" else OUT
    C = covariance(n, rank=5)
    root = psd_root(C, 0.0, "eigen")
    weighting = Weighting(right=root) if side == "right" else Weighting(left=root)
    S = torch.linalg.cholesky(C + 1e-14 * torch.eye(n))
    values = torch.linalg.svdvals(W @ S if side == "right" else S.T @ W)
    for rank in (3, 5):
        dense = LowRank(rank).fit(W, weighting).dense().detach()
        assert float(dense.norm()) < 10 * float(W.norm())
        tail = float(values[rank:].square().sum()) if rank < 5 else 0.0
        assert weighting.norm2(W - dense) == pytest.approx(tail, rel=1e-6, abs=1e-10 * weighting.norm2(W))


def test_factors_have_equal_norms() -> None:
    left, right = balance(1e6 * gaussian(5, 3), 1e-6 * gaussian(3, 7, seed=1))
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
    zero, kept = balance(torch.zeros(5, 3), gaussian(3, 7))
    assert not zero.any()
    assert torch.equal(kept, gaussian(3, 7))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_storage_costs_only_its_rounding(dtype: torch.dtype) -> None:
    weighting = WEIGHTINGS["both cholesky"]
    best = weighting.norm2(W - LowRank(4).fit(W, weighting).dense().detach())
    # factors far outside half precision's range if they were not balanced
    stored = LowRank(4).fit(1e3 * W, weighting, dtype=dtype).dense().detach().double() / 1e3
    assert weighting.norm2(W - stored) <= best + (8 * torch.finfo(dtype).eps) ** 2 * weighting.norm2(W)


def test_ladder_ends_where_nothing_is_saved() -> None:
    assert [form.rank for form in LowRank().ladder((64, 48))] == list(range(1, 28))
    assert [form.rank for form in LowRank(multiple=8).ladder((64, 48))] == [8, 16, 24]
    assert LowRank().ladder((2, 2)) == []
    assert LowRank(3).ladder((64, 48)) == [LowRank(3)]
    dense = 64 * 48
    assert LowRank(27).nbytes((64, 48), torch.int8) < dense <= LowRank(28).nbytes((64, 48), torch.int8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(0), r"low_rank\(rank=0\): the rank is a positive integer"),
        (lambda: LowRank(-3), "positive integer"),
        (lambda: LowRank(2.5), "positive integer"),  # type: ignore[arg-type]
        (lambda: LowRank(2, multiple=0), r"low_rank\(multiple=0\): the multiple is a positive integer"),
        (lambda: LowRank(13).fit(W), r"low_rank\(rank=13\) does not fit .* \(12, 16\): the rank is at most 12"),
        (lambda: LowRank(13).build((12, 16)), "the rank is at most 12"),
        (lambda: LowRank().fit(W), "has no rank yet: give one, or a budget that decides it"),
        (lambda: LowRank().nbytes((12, 16), torch.float32), "has no rank yet"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
