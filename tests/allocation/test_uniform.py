"""The same share for every weight, to the byte."""

from __future__ import annotations

import pytest
import torch

from eckart.allocation import Problem, Uniform
from eckart.allocation.base import best_share, largest_within
from eckart.forms import Curve, Dense, Form, LowRank

SHAPES = [(64, 64), (128, 32), (48, 96)]


def problem(share: float) -> Problem:
    curves = {}
    for k, (out, in_) in enumerate(SHAPES):
        ranks = LowRank().ranks((out, in_))
        forms: list[Form] = [*map(LowRank, ranks), Dense()]
        curves[f"w{k}"] = Curve(forms, [f.nbytes((out, in_), torch.float16) for f in forms], [0.0] * len(forms), 1.0)
    total = sum(2 * out * in_ for out, in_ in SHAPES)
    return Problem(curves, int(share * total))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_every_weight_keeps_the_largest_rank_within_one_share(share: float) -> None:
    found = problem(share)
    choice = Uniform().choose(found)
    ranks = [found.curves[name].forms[i].rank for name, i in choice.items()]  # type: ignore[attr-defined]
    # at the exact share no weight keeps less than this; what is lost to whole ranks may lift some by one
    floors = [int(share * out * in_ / (out + in_)) for out, in_ in SHAPES]
    assert all(floor <= rank <= floor + 1 for floor, rank in zip(floors, ranks, strict=True))
    shares = [n.nbytes[i] / n.nbytes[-1] for n, i in ((found.curves[name], i) for name, i in choice.items())]
    spent = found.nbytes(choice)
    assert spent <= found.budget
    # no larger common share would fit: raising any weight to the largest share used leaves the budget
    largest = max(shares)
    one_more = min(
        c.nbytes[i + 1] / c.nbytes[-1] for c, i in ((found.curves[n], i) for n, i in choice.items()) if i + 1 < len(c)
    )
    above = max(largest, one_more)
    assert sum(c.nbytes[largest_within(c, above * c.nbytes[-1])] for c in found.curves.values()) > found.budget


def test_the_whole_budget_keeps_everything_dense() -> None:
    found = problem(1.0)
    assert all(found.curves[name].forms[i] == Dense() for name, i in Uniform().choose(found).items())


def test_best_share_finds_the_last_step_that_fits() -> None:
    curve = Curve([Dense()] * 100, list(range(1, 101)), [0.0] * 100, 1.0)
    for budget in (1, 17, 99, 100):
        found = Problem({"w": curve}, budget)
        choice = best_share(found, lambda share: {"w": largest_within(curve, share * 100)})
        assert curve.nbytes[choice["w"]] == budget


def test_largest_within_takes_the_better_of_two_at_one_price() -> None:
    curve = Curve([Dense()] * 4, [1, 2, 2, 3], [9.0, 5.0, 4.0, 0.0], 9.0)
    assert [largest_within(curve, n) for n in (0, 1, 2, 2.9, 3, 99)] == [0, 0, 2, 2, 3, 3]
