"""What every allocator owes, as tests: a budget that is kept, refused where it cannot be, and the same choice twice."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from eckart.allocation import ALLOCATORS, Allocator, BudgetError, Problem, as_allocator
from eckart.forms import Curve, Dense, LowRank
from eckart.forms.base import Form, Shape
from eckart.linalg.weighting import PLAIN
from eckart.testing.numbers import gaussian

SHAPES: list[Shape] = [(16, 16), (24, 16), (16, 24), (12, 30), (16, 16), (9, 7), (20, 20)]


class AllocatorContract:
    """The battery. A subclass names its allocators in `allocators`; without that it covers every registered word.

    Attributes:
        monotone: whether a larger budget is promised never to do more damage.
    """

    monotone = True

    def allocators(self) -> list[Allocator]:
        """Allocators to try."""
        return [cls() for cls in ALLOCATORS.words.values()]

    def damage(self, problem: Problem, choice: dict[str, int]) -> float:
        """What a choice costs: relative squared errors, added up."""
        return sum(problem.curves[name].errors[i] / problem.curves[name].energy for name, i in choice.items())

    def pytest_generate_tests(self, metafunc: Any) -> None:
        if "allocator" in metafunc.fixturenames:
            metafunc.parametrize("allocator", self.allocators(), ids=str)

    def test_text_and_back(self, allocator: Allocator) -> None:
        again = ALLOCATORS.parse(str(allocator))
        assert (again, hash(again), str(again)) == (allocator, hash(allocator), str(allocator))
        assert as_allocator(allocator) is allocator
        assert as_allocator(str(allocator)) == allocator

    @pytest.mark.parametrize("share", [0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 1.0, 2.0])
    def test_keeps_within_the_budget(self, allocator: Allocator, share: float) -> None:
        problem = problem_at(share)
        choice = allocator.choose(problem)
        assert choice.keys() == problem.curves.keys()
        assert all(0 <= i < len(problem.curves[name]) for name, i in choice.items())
        assert problem.nbytes(choice) <= problem.budget

    def test_keeps_within_a_tight_budget_or_says_that_it_cannot(self, allocator: Allocator) -> None:
        for share in (0.1, 0.15, 0.2, 0.3, 0.4):
            problem = problem_at(share)
            with suppress(BudgetError):
                assert problem.nbytes(allocator.choose(problem)) <= problem.budget

    def test_an_impossible_budget_is_refused(self, allocator: Allocator) -> None:
        problem = problem_at(1.0)
        impossible = replace(problem, budget=problem.smallest - 1)
        with pytest.raises(BudgetError, match=f"{impossible.budget} bytes .* {problem.smallest} at least"):
            allocator.choose(impossible)

    def test_enough_for_everything_costs_nothing(self, allocator: Allocator) -> None:
        problem = problem_at(1.0)
        assert self.damage(problem, allocator.choose(problem)) == pytest.approx(0, abs=1e-12)

    def test_chooses_the_same_twice(self, allocator: Allocator) -> None:
        choices = []
        for seed in (0, 1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                choices.append(allocator.choose(problem_at(0.7)))
        assert choices[0] == choices[1]

    def test_more_budget_is_never_more_damage(self, allocator: Allocator) -> None:
        if not self.monotone:
            pytest.skip("not promised")
        problems = [problem_at(0.5 + i / 100) for i in range(0, 51, 2)]
        damage = [self.damage(problem, allocator.choose(problem)) for problem in problems]
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(damage))


def problem_at(share: float) -> Problem:
    """Weights of several shapes and spectra in three blocks, one outside of them, at a share of their dense bytes."""
    curves = {f"weight {i}": curve_of(shape, decay=0.3 * i, seed=i) for i, shape in enumerate(SHAPES)}
    blocks = {f"weight {i}": i // 2 for i in range(len(SHAPES) - 1)}
    total = sum(curve.nbytes[-1] for curve in curves.values())

    def loss(choice: Mapping[str, int], tokens: int, draw: int) -> float:
        return sum(curves[name].errors[i] / curves[name].energy for name, i in choice.items())

    return Problem(curves, int(share * total), blocks, [0.3, 0.05, 0.1], loss)


def curve_of(shape: Shape, decay: float, seed: int) -> Curve:
    """The curve of a random matrix whose columns shrink like a power, ending with the matrix left dense."""
    scale = torch.arange(1, shape[1] + 1, dtype=torch.float64) ** -decay
    matrix = gaussian(*shape, seed=seed, dtype=torch.float64) * scale
    found = LowRank().curve(matrix, PLAIN, torch.float32)
    forms: list[Form] = [*found.forms, Dense()]
    return replace(found, forms=forms, nbytes=[*found.nbytes, 4 * shape[0] * shape[1]], errors=[*found.errors, 0.0])
