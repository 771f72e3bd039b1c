"""Low rank with factors that have a form of their own: bytes, order of the fit, ladder and curve."""

from __future__ import annotations

import pytest
import torch

from eckart.forms import LowRank, Quantized, parse
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import psd_root
from eckart.testing import gaussian

SHAPE = (40, 48)
W = gaussian(40, 12, seed=1) @ gaussian(12, 48, seed=2) + 0.3 * gaussian(*SHAPE, seed=3)


def weighting(name: str) -> Weighting:
    if name == "plain":
        return PLAIN
    X = torch.logspace(0, -1.5, 48)[:, None] * gaussian(48, 144, seed=4)
    return Weighting(right=psd_root(X @ X.T, 1e-6))


def error(form: LowRank, w: Weighting) -> float:
    return w.norm2(W - form.fit(W, w).dense().detach())


@pytest.mark.parametrize("name", ["plain", "covariance"])
def test_eight_bits_lose_next_to_nothing_and_four_bits_little(name: str) -> None:
    w, free = weighting(name), error(LowRank(12), weighting(name))
    eight, four = (error(LowRank(12, factors=Quantized(bits, group=None)), w) for bits in (8, 4))
    energy = w.norm2(W)
    assert free < eight < free + 3e-4 * energy < four < free + 5e-2 * energy


@pytest.mark.parametrize("name", ["plain", "covariance"])
def test_the_right_factor_makes_up_for_the_left_one(name: str) -> None:
    """Against both factors quantised by themselves."""
    w, quantiser = weighting(name), Quantized(3, group=None)
    free = LowRank(12).fit(W, w)
    apart = quantiser.fit(free.left.dense().detach()).dense() @ quantiser.fit(free.right.dense().detach()).dense()
    assert error(LowRank(12, factors=quantiser), w) < 0.97 * w.norm2(W - apart)


def test_bytes_are_those_of_the_factors() -> None:
    quantiser = Quantized(8, group=None)
    form = LowRank(12, factors=quantiser)
    parts = quantiser.nbytes((40, 12), torch.bfloat16) + quantiser.nbytes((12, 48), torch.bfloat16)
    assert form.nbytes(SHAPE, torch.bfloat16) == parts == form.fit(W, dtype=torch.bfloat16).nbytes
    assert parts < 0.7 * LowRank(12).nbytes(SHAPE, torch.bfloat16)


def test_the_ladder_is_short_and_reaches_beyond_break_even() -> None:
    form = parse("low_rank(factors=quantized(bits=8))")
    assert isinstance(form, LowRank)
    assert form.open
    rungs = form.ladder((640, 480))
    assert 12 <= len(rungs) <= 16
    ranks = [r.rank for r in rungs if isinstance(r, LowRank)]
    assert (ranks[0], ranks[-1]) == (1, 480)
    assert all(rung.factors == form.factors for rung in rungs if isinstance(rung, LowRank))
    assert [r.rank for r in LowRank(multiple=16, factors=Quantized(8)).ladder((48, 40)) if isinstance(r, LowRank)] == [16, 32]  # fmt: skip # noqa: E501
    assert LowRank(multiple=64, factors=Quantized(8)).ladder((48, 40)) == []


@pytest.mark.parametrize("name", ["plain", "covariance"])
def test_the_curve_tells_the_errors_of_the_fits(name: str) -> None:
    w = weighting(name)
    curve = LowRank(factors=Quantized(6, group=16)).curve(W, w, torch.float32)
    assert len(curve) > 8
    assert max(curve.nbytes) < 4 * 40 * 48
    for form, nbytes, found in zip(curve.forms, curve.nbytes, curve.errors, strict=True):
        assert isinstance(form, LowRank)
        assert nbytes == form.nbytes(SHAPE, torch.float32)
        assert found == pytest.approx(error(form, w), rel=0.05)
    assert LowRank(factors=Quantized(8)).curve(gaussian(1, 3), PLAIN, torch.float16).nbytes == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("low_rank(rank=2, factors=quantized())", "give the factors all their settings; only the rank is left"),
        ("low_rank(rank=2, factors=8)", r"low_rank\(factors=8\): that is no form"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)
