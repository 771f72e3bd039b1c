"""Small allocation problems, and every choice that they allow."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from eckart.allocation import Problem
from eckart.forms import Curve, Dense


def problem(steps: list[list[int]], errors: list[list[float]], budget: int) -> Problem:
    """Weights with these byte counts and squared errors."""
    curves = {
        f"w{k}": Curve([Dense()] * len(b), b, e, e[0]) for k, (b, e) in enumerate(zip(steps, errors, strict=True))
    }
    return Problem(curves, budget)


def damage(found: Problem, choice: dict[str, int]) -> float:
    return sum(found.curves[name].errors[i] for name, i in choice.items())


def brute_force(found: Problem, budget: int | None = None, loss: Callable[[dict[str, int]], float] | None = None) -> float:  # fmt: skip # noqa: E501
    """The least damage of all choices within the budget; infinity where there is none."""
    names, ranges = list(found.curves), [range(len(c)) for c in found.curves.values()]
    every = (dict(zip(names, indices, strict=True)) for indices in itertools.product(*ranges))
    allowed = found.budget if budget is None else budget
    return min((loss(c) if loss else damage(found, c) for c in every if found.nbytes(c) <= allowed), default=np.inf)


@st.composite
def ragged(draw: st.DrawFn, largest: int = 20, most: int = 4) -> Problem:
    """Any curves over any increasing byte counts, not convex and not even falling."""
    steps, errors = [], []
    for _ in range(draw(st.integers(1, most))):
        size = draw(st.integers(1, 6))
        steps.append(np.cumsum(draw(st.lists(st.integers(1, largest), min_size=size, max_size=size))).tolist())
        errors.append([*draw(st.lists(st.floats(0.01, 10), min_size=size - 1, max_size=size - 1)), 0.0])
    return problem(steps, errors, draw(st.integers(sum(b[0] for b in steps), sum(b[-1] for b in steps) + 3)))
