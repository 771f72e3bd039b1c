"""Sums and products: no worse than their parts, as good as what is known to be optimal, and three deep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from eckart.checkpoint.layout import save_tensors
from eckart.forms import Dense, Diagonal, Form, LowRank, Product, Sum, drop_in, parse
from eckart.forms.algebra import thin
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import psd_root
from eckart.testing import error_ratio, gaussian

SHAPE = (20, 16)
W = gaussian(*SHAPE, seed=1, dtype=torch.float64)


def root(n: int, seed: int) -> torch.Tensor:
    X = torch.logspace(0, -2, n, dtype=torch.float64)[:, None] * gaussian(n, 3 * n, seed=seed, dtype=torch.float64)
    return X @ X.T


WEIGHTINGS = {"plain": PLAIN, "both sides": Weighting(psd_root(root(20, 2), 0.0), psd_root(root(16, 3), 0.0))}


def error(form: Form, matrix: torch.Tensor, weighting: Weighting = PLAIN) -> float:
    """Relative squared error of a fit."""
    return weighting.norm2(matrix - form.fit(matrix, weighting).dense().detach()) / weighting.norm2(matrix)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    "text",
    [
        "low_rank(rank=3) + diagonal()",
        "diagonal() + low_rank(rank=3)",
        "low_rank(rank=1) + low_rank(rank=4) + diagonal()",
        "dense(width=3) @ dense() + diagonal()",
    ],
)
def test_a_sum_is_no_worse_than_its_best_term(text: str, weighting: str) -> None:
    form, w = parse(text), WEIGHTINGS[weighting]
    assert isinstance(form, Sum)
    alone = min(error(term, W, w) for term in form.terms)
    assert error(form, W, w) <= alone * (1 + 1e-12)


@pytest.mark.parametrize("text", ["low_rank(rank=3) + diagonal()", "diagonal() + low_rank(rank=3)"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_recovers_what_was_planted(text: str, dtype: torch.dtype) -> None:
    planted = gaussian(24, 3, seed=4) @ gaussian(3, 24, seed=5) + torch.diag(gaussian(24, seed=6))
    assert error(parse(text), planted.to(dtype)) <= 1e-7
    assert error(parse(text), (gaussian(24, 3, seed=4) @ gaussian(3, 24, seed=5)).to(dtype)) <= 1e-12


def test_two_low_ranks_add_up_to_one() -> None:
    for w in WEIGHTINGS.values():
        assert error(parse("low_rank(rank=2) + low_rank(rank=3)"), W, w) == pytest.approx(error(LowRank(5), W, w))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("rank", [1, 4, 12])
@pytest.mark.parametrize("text", ["dense(width={}) @ dense()", "dense() @ dense(width={})", "dense(width={}) @ diagonal() @ dense()"])  # fmt: skip # noqa: E501
def test_a_product_of_full_factors_reaches_the_optimum(text: str, rank: int, weighting: str) -> None:
    w = WEIGHTINGS[weighting]
    best = error(LowRank(rank), W, w)
    assert best * (1 - 1e-9) <= error(parse(text.format(rank)), W, w) <= best * (1 + 1e-4)


def test_a_product_of_wide_factors_is_exact() -> None:
    for text in ("dense(width=16) @ dense()", "dense(width=20) @ dense()", "dense(width=31) @ dense()"):
        for w in WEIGHTINGS.values():
            assert error(parse(text), W, w) <= 1e-10
    assert error(parse("dense() @ diagonal()"), W) <= 1e-10
    assert error(parse("diagonal() @ dense()"), W) <= 1e-10


THREE_DEEP = [
    "dense(width=4) @ diagonal() @ dense()",
    "diagonal() @ low_rank(rank=3) @ diagonal()",
    "dense(width=3) @ (dense() @ dense(width=5))",
    "low_rank(rank=2) @ dense(width=7) + diagonal()",
    "dense(width=4) @ (low_rank(rank=2) + diagonal())",
    "(dense(width=4) @ dense() + low_rank(rank=1)) @ dense(width=16)",
]


@pytest.mark.parametrize("text", THREE_DEEP)
def test_three_deep_fits_saves_loads_and_runs(text: str, tmp_path: Path) -> None:
    form = parse(text)
    assert parse(str(form)) == form
    matrix, x = gaussian(12, 10, seed=1), gaussian(4, 10, seed=2)
    layer = drop_in(nn.Linear(10, 12), form.fit(matrix), gaussian(12, seed=3))
    relative = error(form, matrix)
    assert error(LowRank(10), matrix) <= relative < 1
    save_tensors(layer.state_dict(), tmp_path / "layer.safetensors")
    again = drop_in(nn.Linear(10, 12), form.build((12, 10), device="meta"), torch.empty(12, device="meta"))
    again.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert torch.equal(again(x), layer(x))
    assert error_ratio(layer(x), x @ layer.weight.T + gaussian(12, seed=3)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_factor_of_low_rank_survives_narrow_storage(dtype: torch.dtype) -> None:
    """The left factor has rank 2 of 7: least squares through it must not amplify the rounding of its storage."""
    form, matrix = parse("low_rank(rank=2) @ dense(width=7)"), gaussian(12, 10, seed=1)
    stored = form.fit(matrix, dtype=dtype).dense().detach().float()
    best = float((matrix - LowRank(2).fit(matrix).dense().detach()).norm())
    assert float((matrix - stored).norm()) <= best + 32 * torch.finfo(dtype).eps * float(matrix.norm())


def test_a_zero_matrix_has_a_zero_fit() -> None:
    for text in ("low_rank(rank=2) + diagonal()", "dense(width=3) @ dense()"):
        assert not parse(text).fit(torch.zeros(8, 6)).dense().detach().any()


def test_sums_are_flat_and_bind_looser_than_products() -> None:
    a, b, c = LowRank(1), Diagonal(), Dense(4)
    assert (a + b) + c == a + (b + c) == Sum((a, b, c))
    assert str(a + c @ b) == "low_rank(rank=1) + dense(width=4) @ diagonal()"
    assert str((a + b) @ c) == "(low_rank(rank=1) + diagonal()) @ dense(width=4)"
    assert str(a @ (b @ c)) == "low_rank(rank=1) @ (diagonal() @ dense(width=4))"
    assert str((a @ b) @ c) == "low_rank(rank=1) @ diagonal() @ dense(width=4)"


def test_ladders_close_every_dial() -> None:
    for text in ("low_rank() + diagonal()", "low_rank() + low_rank()", "dense() @ dense()", "dense() @ diagonal() @ dense()"):  # fmt: skip # noqa: E501
        form = parse(text)
        rungs = form.ladder((32, 24))
        assert form.open
        assert 2 <= len(rungs) <= 100
        assert len(set(rungs)) == len(rungs)
        for rung in rungs:
            assert not rung.open
            assert rung.ladder((32, 24)) == [rung]
            rung.build((32, 24), device="meta")


def test_a_curve_of_a_sum_tells_the_errors_of_its_fits() -> None:
    form = parse("low_rank() + diagonal()")
    curve = form.curve(W, WEIGHTINGS["both sides"], torch.float64)
    assert list(curve.nbytes) == sorted(curve.nbytes)
    for rung, nbytes, found in zip(curve.forms, curve.nbytes, curve.errors, strict=True):
        assert nbytes == rung.nbytes(SHAPE, torch.float64)
        assert found / curve.energy == pytest.approx(error(rung, W, WEIGHTINGS["both sides"]))


def test_thin_keeps_both_ends() -> None:
    rungs: list[Form] = [LowRank(r) for r in range(1, 31)]
    kept = thin(rungs, 5)
    assert len(kept) == 5
    assert (kept[0], kept[-1]) == (rungs[0], rungs[-1])
    assert thin(rungs, 99) == rungs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dense(width=3) @ dense(width=5)", r"do not meet on shape \(20, 16\), 3 columns against 5 rows"),
        ("diagonal() @ dense(width=5)", "20 columns against 5 rows"),
        ("dense() @ dense()", "the width inside the product is open; give one, or a budget that decides it"),
        ("low_rank(rank=17) + diagonal()", "the rank is at most 16"),
        ("dense(width=4) @ low_rank(rank=5)", "the rank is at most 4"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    form = parse(text)
    with pytest.raises(ValueError, match=message):
        form.build(SHAPE)
    with pytest.raises(ValueError, match=message):
        form.fit(W)


def test_a_product_that_nobody_can_close_says_so() -> None:
    form = Product(LowRank(2), LowRank(2))
    with pytest.raises(ValueError, match=r"no factor says how wide the product is inside; give one dense\(width=..\)"):
        form.ladder(SHAPE)


def test_factors_that_do_not_meet_make_no_module() -> None:
    with pytest.raises(ValueError, match=r"the factors do not meet, \(4, 3\) @ \(5, 6\)"):
        type(LowRank(1).build((2, 2)))(Dense().build((4, 3)), Dense().build((5, 6)), Dense() @ Dense())
