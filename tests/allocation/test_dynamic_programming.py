"""The knapsack against every choice, up to the resolution that it states."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from problems import brute_force, damage, problem, ragged

from eckart.allocation import Optimal, Problem
from eckart.allocation.dynamic_programming import DynamicProgramming, knapsack
from eckart.allocation.greedy import Greedy

EXACT = DynamicProgramming("error")


@given(ragged())
@settings(deadline=None, max_examples=100)
def test_equals_brute_force_where_the_table_is_fine_enough(found: Problem) -> None:
    assert damage(found, EXACT.choose(found)) == pytest.approx(brute_force(found), rel=1e-12, abs=1e-12)


@given(ragged(largest=1000))
@settings(deadline=None, max_examples=60)
def test_a_coarse_table_loses_no_more_than_its_resolution_and_keeps_the_budget(found: Problem) -> None:
    coarse = DynamicProgramming("error", steps=23)
    step = coarse.resolution(found)
    choice = coarse.choose(found)
    assert found.nbytes(choice) <= found.budget
    assert damage(found, choice) <= brute_force(found, found.budget - step * (len(found.curves) + 1)) + 1e-12


def test_four_layers_by_six_amounts() -> None:
    """RD_PRUNE's table: surviving weights against distortion, measured, not convex, not monotone."""
    draw = np.random.default_rng(0)
    sizes = [40, 60, 100, 200]
    steps = [[max(1, n * d // 5) for d in range(6)] for n in sizes]
    for _ in range(20):
        errors = [sorted(draw.random(6), reverse=True) for _ in sizes]
        errors[1][2], errors[1][3] = errors[1][3], errors[1][2]
        found = problem(steps, [list(map(float, e)) for e in errors], int(draw.integers(10, 400)))
        assert damage(found, EXACT.choose(found)) == pytest.approx(brute_force(found), rel=1e-12)


def test_the_resolution_is_what_divides_all_costs() -> None:
    found = problem([[64, 128, 640], [32, 96]], [[2.0, 1.0, 0.0], [1.0, 0.0]], 400)
    assert DynamicProgramming().resolution(found) == 64
    assert DynamicProgramming(steps=2).resolution(found) == 192
    assert DynamicProgramming().resolution(problem([[7]], [[0.0]], 9)) == 1


def test_beats_prices_and_greed_where_the_best_rate_leaves_bytes_that_nothing_fits() -> None:
    found = problem([[0, 6], [0, 5], [0, 5]], [[12.0, 0.0], [9.0, 0.0], [9.0, 0.0]], 10)
    assert EXACT.choose(found) == {"w0": 0, "w1": 1, "w2": 1}
    for other in (Optimal("error"), Greedy("error")):
        assert damage(found, other.choose(found)) == 18 > damage(found, EXACT.choose(found)) == 12


def test_knapsack_prefers_the_cheaper_of_equals_and_says_where_nothing_fits() -> None:
    costs, losses = [np.array([0, 2, 5]), np.array([1, 2])], [np.array([1.0, 0.5, 0.5]), np.array([0.0, 0.0])]
    assert knapsack(costs, losses, 9) == [1, 0]
    assert knapsack(costs, losses, 2) == [0, 0]
    with pytest.raises(ValueError, match="no choice costs at most 0"):
        knapsack(costs, losses, 0)


def test_an_error_budget_and_the_least_bytes_are_the_same_problem_turned_round() -> None:
    """L-GreCo: the costs are discretised errors, and what is least is the size."""
    draw = np.random.default_rng(1)
    errors = [np.sort(draw.integers(0, 30, 5))[::-1] for _ in range(4)]
    sizes = [np.sort(draw.random(5)) for _ in range(4)]
    choice = knapsack(errors, sizes, 40)
    assert sum(int(e[i]) for e, i in zip(errors, choice, strict=True)) <= 40
    best = min(
        sum(float(s[i]) for s, i in zip(sizes, c, strict=True))
        for c in np.ndindex(5, 5, 5, 5)
        if sum(int(e[i]) for e, i in zip(errors, c, strict=True)) <= 40
    )
    assert sum(float(s[i]) for s, i in zip(sizes, choice, strict=True)) == pytest.approx(best)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"dynamic_programming\(steps=0\): the number of steps is a positive integer"):
        DynamicProgramming(steps=0)
    with pytest.raises(ValueError, match=r"dynamic_programming\(damage='x'\): it is 'error' or 'relative'"):
        DynamicProgramming("x")
