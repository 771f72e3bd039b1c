"""What every allocator owes: from a curve for every weight and one budget, one point on each curve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eckart.forms.base import Curve
from eckart.forms.language import Vocabulary

ALLOCATORS: Vocabulary[Allocator] = Vocabulary("allocation")
Fitness = Callable[[Mapping[str, int], int, int], float]
"""(choice, tokens, draw) -> loss per token in nats, on that many tokens, which are the same for the same draw."""


class BudgetError(ValueError):
    """No choice meets the budget."""


@dataclass(frozen=True)
class Problem:
    """One allocation.

    Attributes:
        curves: weight -> its curve, cheapest setting first; the last point is the weight left dense, at no error.
        budget: bytes that all chosen points together may take.
        blocks: weight -> index of its block.
        influence: for every block, 1 - mean cosine between what enters and what leaves it; only where asked for.
        fitness: the measured loss of the whole model after a choice; only where asked for.
        journal: a file in which a long search may keep its state, so that it goes on where it was killed.
    """

    curves: Mapping[str, Curve]
    budget: int
    blocks: Mapping[str, int] = field(default_factory=dict)
    influence: Sequence[float] = ()
    fitness: Fitness | None = None
    journal: Path | None = None

    @property
    def smallest(self) -> int:
        """Bytes of the cheapest choice."""
        return sum(min(c.nbytes) for c in self.curves.values())

    def nbytes(self, choice: Mapping[str, int]) -> int:
        """Bytes of a choice."""
        return sum(self.curves[name].nbytes[i] for name, i in choice.items())

    def check(self) -> None:
        """Raise `BudgetError` where even the cheapest choice is too dear."""
        if self.smallest > self.budget:
            raise BudgetError(f"the budget leaves {self.budget} bytes for weights that take {self.smallest} at least")


@dataclass(frozen=True)
class Allocator(ABC):
    """Chooses one point on each curve. Hashable, printable, parsed back by `ALLOCATORS.parse`.

    Attributes:
        needs_errors: whether the choice depends on more than bytes.
        needs_influence, needs_fitness: what else a problem has to hold.
    """

    needs_errors = True
    needs_influence = False
    needs_fitness = False

    def __str__(self) -> str:
        return ALLOCATORS.print(self)

    def choose(self, problem: Problem) -> dict[str, int]:
        """Weight -> index on its curve, within the budget. Raises `BudgetError` where nothing is."""
        problem.check()
        choice = self.allocate(problem)
        if problem.nbytes(choice) > problem.budget:
            raise BudgetError(f"{self} spent {problem.nbytes(choice)} bytes of {problem.budget}")
        return choice

    @abstractmethod
    def allocate(self, problem: Problem) -> dict[str, int]:
        """The choice; `choose` has made sure that one exists."""


def as_allocator(allocator: Allocator | str) -> Allocator:
    """An allocator, from itself or from its text."""
    return allocator if isinstance(allocator, Allocator) else ALLOCATORS.parse(allocator)


def largest_within(curve: Curve, nbytes: float) -> int:
    """Index of the dearest point that costs at most `nbytes`; the cheapest where none does."""
    order, costs = curve.by_cost
    fitting = bisect_right(costs, nbytes)
    return order[fitting - 1] if fitting else 0


def best_share(problem: Problem, choice_at: Callable[[float], dict[str, int]]) -> dict[str, int]:
    """The choice at the largest share in [0, 1] whose bytes, non-decreasing in the share, meet the budget."""
    if problem.nbytes(full := choice_at(1.0)) <= problem.budget:
        return full
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if problem.nbytes(choice_at(middle)) <= problem.budget else (low, middle)
    return choice_at(low)
