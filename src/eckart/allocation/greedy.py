"""From the cheapest point of every weight upwards, each step where a byte gains most."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.allocation.additive import Additive, cheapest, spend
from eckart.allocation.base import ALLOCATORS, Problem


@ALLOCATORS.word("greedy")
@dataclass(frozen=True)
class Greedy(Additive):
    """The step, to any dearer point of any weight, with the most gain for a byte, as long as one is affordable."""

    def allocate(self, problem: Problem) -> dict[str, int]:
        nbytes, damage = self.table(problem)
        start = cheapest(nbytes, damage)
        left = problem.budget - sum(float(b[i]) for b, i in zip(nbytes, start, strict=True))
        return dict(zip(problem.curves, spend(start, nbytes, damage, left), strict=True))
