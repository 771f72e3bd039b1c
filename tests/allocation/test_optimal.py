"""The optimum against brute force, on problems small enough to try every choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.allocation import Optimal, Problem
from eckart.forms import Curve, Dense

ALLOCATOR = Optimal(damage="error")


def problem(steps: list[list[int]], errors: list[list[float]], budget: int) -> Problem:
    """Weights with these byte counts and squared errors."""
    curves = {
        f"w{k}": Curve([Dense()] * len(b), b, e, e[0]) for k, (b, e) in enumerate(zip(steps, errors, strict=True))
    }
    return Problem(curves, budget)


def damage(found: Problem, choice: dict[str, int]) -> float:
    return sum(found.curves[name].errors[i] for name, i in choice.items())


def choices(found: Problem) -> list[dict[str, int]]:
    """Every choice within the budget."""
    names, ranges = list(found.curves), [range(len(c)) for c in found.curves.values()]
    every = (dict(zip(names, indices, strict=True)) for indices in itertools.product(*ranges))
    return [choice for choice in every if found.nbytes(choice) <= found.budget]


def brute_force(found: Problem) -> float:
    return min(damage(found, choice) for choice in choices(found))


@st.composite
def convex(draw: st.DrawFn) -> Problem:
    """Curves whose gains per equal step of bytes fall, as singular values do."""
    count = draw(st.integers(1, 4))
    step = draw(st.integers(1, 5))
    errors = []
    for _ in range(count):
        gains = sorted(draw(st.lists(st.floats(0.01, 10), min_size=0, max_size=4)), reverse=True)
        errors.append([*np.cumsum(gains[::-1])[::-1].tolist(), 0.0])
    steps = [[step * (i + 1) for i in range(len(e))] for e in errors]
    return problem(steps, errors, draw(st.integers(count * step, sum(b[-1] for b in steps) + 3)))


@st.composite
def ragged(draw: st.DrawFn) -> Problem:
    """Any falling curves over any increasing byte counts."""
    steps, errors = [], []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 5))
        steps.append(np.cumsum(draw(st.lists(st.integers(1, 20), min_size=size, max_size=size))).tolist())
        falls = draw(st.lists(st.floats(0.01, 10), min_size=size, max_size=size))
        errors.append([*np.cumsum(falls[:-1])[::-1].tolist(), 0.0])
    return problem(steps, errors, draw(st.integers(sum(b[0] for b in steps), sum(b[-1] for b in steps) + 3)))


@given(convex())
@settings(deadline=None, max_examples=60)
def test_convex_curves_of_equal_steps_are_solved_exactly(found: Problem) -> None:
    assert damage(found, ALLOCATOR.choose(found)) == pytest.approx(brute_force(found), rel=1e-9, abs=1e-12)


@given(ragged())
@settings(deadline=None, max_examples=60)
def test_any_curves_are_solved_at_least_as_well_as_by_any_price(found: Problem) -> None:
    """Every choice that some price of a byte makes and that fits is no better; nothing is better than brute force."""
    slopes = {0.0, 1e9}
    for c in found.curves.values():
        for i, j in itertools.combinations(range(len(c)), 2):
            slopes.add((c.errors[i] - c.errors[j]) / (c.nbytes[j] - c.nbytes[i]))
    prices = sorted(slopes)
    prices += [(a + b) / 2 for a, b in itertools.pairwise(prices)]

    def at(price: float) -> dict[str, int]:
        return {n: int(np.argmin(np.add(c.errors, price * np.asarray(c.nbytes)))) for n, c in found.curves.items()}

    priced = [damage(found, choice) for choice in map(at, prices) if found.nbytes(choice) <= found.budget]
    ours = damage(found, ALLOCATOR.choose(found))
    assert brute_force(found) <= ours + 1e-12
    assert ours <= min(priced) * (1 + 1e-12) + 1e-12


@given(ragged(), st.integers(1, 10))
@settings(deadline=None, max_examples=60)
def test_more_budget_is_never_more_damage(found: Problem, more: int) -> None:
    larger = Problem(found.curves, found.budget + more)
    before, after = (damage(p, ALLOCATOR.choose(p)) for p in (found, larger))
    assert after <= before * (1 + 1e-12)


@given(ragged())
@settings(deadline=None, max_examples=30)
def test_nothing_affordable_is_left_unspent(found: Problem) -> None:
    choice = ALLOCATOR.choose(found)
    left = found.budget - found.nbytes(choice)
    for name, i in choice.items():
        c = found.curves[name]
        assert not any(c.nbytes[j] - c.nbytes[i] <= left and c.errors[j] < c.errors[i] for j in range(len(c)))


def test_relative_damage_does_not_see_the_scale_of_a_weight() -> None:
    steps, errors = [[1, 2, 3, 4], [1, 2, 3, 4]], [[5.0, 2.0, 1.0, 0.0], [4000.0, 2000.0, 1000.0, 0.0]]
    found = problem(steps, errors, 4)
    assert Optimal(damage="error").choose(found) == {"w0": 0, "w1": 2}
    for scale in (1.0, 1e-3, 1e3):
        scaled = problem(steps, [errors[0], [scale * e for e in errors[1]]], 4)
        assert Optimal().choose(scaled) == {"w0": 1, "w1": 1}


def test_equal_weights_share_what_they_can() -> None:
    """All curves alike jump at the same price: the greedy part has to spend the budget one step at a time."""
    steps, errors = [[10, 20, 30]] * 6, [[3.0, 1.0, 0.0]] * 6
    found = problem(steps, errors, 6 * 10 + 35)
    choice = ALLOCATOR.choose(found)
    assert found.nbytes(choice) == 90
    assert sorted(choice.values()) == [0, 0, 0, 1, 1, 1]


def test_an_energy_of_zero_is_no_division() -> None:
    found = problem([[1, 2], [1, 2]], [[0.0, 0.0], [1.0, 0.0]], 3)
    assert Optimal().choose(found) == {"w0": 0, "w1": 1}
