"""Sums fitted in a given order: one sweep repairs, more alternate, and none is worse than fewer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from eckart.forms import Form, LowRank, Sum, parse
from eckart.forms.in_turn import InTurn
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import psd_root
from eckart.testing import gaussian

W = gaussian(24, 8, seed=1) @ gaussian(8, 32, seed=2) + gaussian(24, 32, seed=3)
X = torch.logspace(0, -1.5, 32)[:, None] * gaussian(32, 96, seed=4)
COVARIANCE = Weighting(right=psd_root(X @ X.T, 1e-6))
QUANTISER = "quantized(bits=3, group=16)"


def error(form: Form | str, weighting: Weighting = PLAIN) -> float:
    form = parse(form) if isinstance(form, str) else form
    return weighting.norm2(W - form.fit(W, weighting).dense().detach())


@pytest.mark.parametrize("weighting", [PLAIN, COVARIANCE], ids=["plain", "covariance"])
def test_one_sweep_fits_the_second_to_what_the_first_leaves(weighting: Weighting) -> None:
    first, second = parse(QUANTISER), LowRank(4)
    kept = first.fit(W, weighting)
    fitted = InTurn(first, second).fit(W, weighting)
    assert torch.equal(fitted._term(0).dense(), kept.dense())
    assert torch.equal(fitted._term(1).dense(), second.fit(W - kept.dense(), weighting).dense())


@pytest.mark.parametrize("order", ["first=low_rank(rank=6), second=quantized(bits=3, group=16)", "first=quantized(bits=3, group=16), second=low_rank(rank=6)"])  # fmt: skip # noqa: E501
def test_more_sweeps_are_never_worse_and_at_first_better(order: str) -> None:
    errors = [error(f"in_turn({order}, sweeps={n})") for n in (1, 2, 3, 5, 9, 30)]
    assert all(after <= before for before, after in pairwise(errors))
    assert errors[2] < 0.99 * errors[0]


@pytest.mark.parametrize("text", ["in_turn()", "in_turn(first=quantized(bits=4, group=8))", "in_turn(first=low_rank(rank=4), second=quantized(), sweeps=3)"])  # fmt: skip # noqa: E501
def test_a_curve_tells_the_errors_of_its_fits(text: str) -> None:
    curve = parse(text).curve(W, COVARIANCE, torch.float32)
    assert len(curve) > 4
    assert list(curve.nbytes) == sorted(curve.nbytes)
    for rung, nbytes, found in list(zip(curve.forms, curve.nbytes, curve.errors, strict=True))[::5]:
        assert nbytes == rung.nbytes((24, 32), torch.float32) < 4 * 24 * 32
        assert found == pytest.approx(error(rung, COVARIANCE), rel=1e-3, abs=1e-9 * curve.energy)


def test_has_the_bytes_and_the_tensors_of_the_sum() -> None:
    form = parse(f"in_turn(first={QUANTISER}, second=low_rank(rank=2))")
    assert isinstance(form, InTurn)
    plain = Sum(form.terms)
    assert form.nbytes((24, 32), torch.float16) == plain.nbytes((24, 32), torch.float16)
    assert form.fit(W).state_dict().keys() == plain.fit(W).state_dict().keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("in_turn(sweeps=0)", r"in_turn\(sweeps=0\): the number of sweeps is a positive integer"),
        ("in_turn(first=3)", r"in_turn\(first=3\): that is no form"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_a_curve_does_few_sweeps_of_many() -> None:
    text = "in_turn(first=low_rank(rank=6), second=quantized(group=16), sweeps={})"
    long, short = (parse(text.format(n)).curve(W, PLAIN, torch.float32) for n in (40, 4))
    assert long.errors == short.errors
    assert {f.sweeps for f in long.forms if isinstance(f, InTurn)} == {40}
    some = [2, len(long) - 2]
    assert all(error(long.forms[i], PLAIN) <= long.errors[i] * (1 + 1e-6) for i in some)
