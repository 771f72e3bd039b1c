"""Every registered allocator passes the battery that ships with the package, at its defaults and at other settings."""

from __future__ import annotations

import pytest

from eckart.allocation import ALLOCATORS, Allocator, Entropy, Optimal, Problem, SpectrumThreshold
from eckart.testing import AllocatorContract


class TestAllocators(AllocatorContract):
    def allocators(self) -> list[Allocator]:
        return [*super().allocators(), Entropy(temperature=1.0, cap=0.6), SpectrumThreshold(min_reduction=0.3)]


class TestInUnitsOfTheLoss(AllocatorContract):
    def allocators(self) -> list[Allocator]:
        return [Optimal(damage="error")]

    def damage(self, problem: Problem, choice: dict[str, int]) -> float:
        return sum(problem.curves[name].errors[i] for name, i in choice.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimal(damage='none')", r"optimal\(damage='none'\): it is 'error' or 'relative'"),
        ("optimum", "unknown allocation 'optimum'; did you mean 'optimal'"),
        ("uniform() @ uniform()", "allocations cannot be combined with operators"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ALLOCATORS.parse(text)
