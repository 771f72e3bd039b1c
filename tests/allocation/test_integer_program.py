"""The integer program against every choice, and against the dynamic programme where both apply."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from problems import brute_force, damage, problem, ragged

from eckart.allocation import Problem
from eckart.allocation.dynamic_programming import DynamicProgramming
from eckart.allocation.integer_program import IntegerProgram
from eckart.testing.allocation import problem_at

ALLOCATOR = IntegerProgram("error")


@given(ragged(largest=1000))
@settings(deadline=None, max_examples=30)
def test_equals_brute_force(found: Problem) -> None:
    choice = ALLOCATOR.choose(found)
    assert found.nbytes(choice) <= found.budget
    assert damage(found, choice) == pytest.approx(brute_force(found), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_equals_dynamic_programming_on_real_curves(share: float) -> None:
    found = problem_at(share)
    assert DynamicProgramming().resolution(found) <= 4  # exact: all costs are multiples of a number's bytes
    ours, theirs = (sum(found.curves[n].errors[i] / found.curves[n].energy for n, i in a.choose(found).items())
                    for a in (IntegerProgram(), DynamicProgramming()))  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_is_no_worse_than_the_best_single_setting_that_fits() -> None:
    """LQ-LoRA's table: the same configurations for every matrix, their costs in bits times numbers."""
    draw = np.random.default_rng(0)
    bits, sizes = np.array([2.25, 2.5, 3.25, 4.125, 4.5, 8.5]), draw.integers(2**18, 2**22, 12)
    steps = [np.floor(bits * n / 8).astype(int).tolist() for n in sizes]
    errors = [(draw.lognormal() * n * 4.0**-bits * draw.uniform(0.8, 1.2, 6)).tolist() for n in sizes]
    found = problem(steps, errors, int(3.4 * sizes.sum() / 8))
    ours = damage(found, ALLOCATOR.choose(found))
    uniform = [dict.fromkeys(found.curves, i) for i in range(len(bits))]
    assert ours < min(damage(found, c) for c in uniform if found.nbytes(c) <= found.budget)
    assert ours <= damage(found, DynamicProgramming("error").choose(found)) * (1 + 1e-9)


def test_the_time_limit_is_a_setting() -> None:
    with pytest.raises(ValueError, match=r"integer_program\(seconds=0\): the time limit is positive"):
        IntegerProgram(seconds=0)
    draw = np.random.default_rng(0)
    steps = [np.cumsum(draw.integers(1, 9999, 40)).tolist() for _ in range(60)]
    errors = [np.cumsum(draw.random(40))[::-1].tolist() for _ in range(60)]
    found = problem(steps, errors, sum(s[13] for s in steps))
    with pytest.raises(RuntimeError, match=r"found no choice in 1e-09 s .*: allow more seconds, or use dynamic_progr"):
        IntegerProgram(seconds=1e-9).choose(found)
