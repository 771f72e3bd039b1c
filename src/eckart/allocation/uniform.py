"""The same share of its dense bytes for every weight."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.allocation.base import ALLOCATORS, Allocator, Problem, best_share, largest_within


@ALLOCATORS.word("uniform")
@dataclass(frozen=True)
class Uniform(Allocator):
    """Every weight keeps the largest setting within one common share of its dense bytes."""

    needs_errors = False

    def allocate(self, problem: Problem) -> dict[str, int]:
        def at(share: float) -> dict[str, int]:
            return {name: largest_within(c, share * c.nbytes[-1]) for name, c in problem.curves.items()}

        return best_share(problem, at)
