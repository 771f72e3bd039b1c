"""Greed against the definition, step by step, and against the optimum where curves are convex."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from problems import brute_force, damage, problem, ragged

from eckart.allocation import Problem
from eckart.allocation.greedy import Greedy


def naive(found: Problem) -> dict[str, int]:
    """Looks at every step of every weight before each step."""
    choice = {name: int(np.lexsort((c.errors, c.nbytes))[0]) for name, c in found.curves.items()}
    while True:
        steps = [
            ((c.errors[choice[n]] - c.errors[j]) / (c.nbytes[j] - c.nbytes[choice[n]]), k, -j, n)
            for k, (n, c) in enumerate(found.curves.items())
            for j in range(len(c))
            if c.errors[j] < c.errors[choice[n]]
            and c.nbytes[j] - c.nbytes[choice[n]] <= found.budget - found.nbytes(choice)
        ]
        if not steps:
            return choice
        _, _, j, name = max(steps)
        choice[name] = -j


@given(ragged(most=5))
@settings(deadline=None, max_examples=100)
def test_takes_the_step_that_gains_most_for_a_byte(found: Problem) -> None:
    assert Greedy("error").choose(found) == naive(found)


def test_is_optimal_where_gains_of_equal_steps_fall() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        errors = [[*np.cumsum(np.sort(draw.random(4)))[::-1].tolist(), 0.0] for _ in range(4)]
        found = problem([[3, 6, 9, 12, 15]] * 4, errors, int(draw.integers(12, 60)))
        assert damage(found, Greedy("error").choose(found)) == pytest.approx(brute_force(found))
