"""The least total error under a budget when errors add up: a Lagrange multiplier found by bisection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eckart.allocation.additive import Additive, spend
from eckart.allocation.base import ALLOCATORS, Problem


@ALLOCATORS.word("optimal")
@dataclass(frozen=True)
class Optimal(Additive):
    """Minimises sum of damage + λ bytes for each weight by itself, and bisects λ until the budget is met.

    The choice is optimal among all that lie on the curves' convex hulls (Everett, 1963); what the hulls leave of the
    budget is then spent greedily on the best remaining gains.
    """

    def allocate(self, problem: Problem) -> dict[str, int]:
        nbytes, damage = self.table(problem)

        def at(price: float) -> list[int]:
            return [int(np.argmin(d + price * b)) for d, b in zip(damage, nbytes, strict=True)]

        def cost(choice: list[int]) -> float:
            return sum(b[i] for b, i in zip(nbytes, choice, strict=True))

        if cost(best := at(0.0)) > problem.budget:
            low, high = 0.0, 1e-30
            while cost(at(high)) > problem.budget and high < 1e30:
                low, high = high, high * 10
            for _ in range(100):
                middle = (low * high) ** 0.5 if low > 0 else high / 2
                low, high = (middle, high) if cost(at(middle)) > problem.budget else (low, middle)
            best = at(high)
        if cost(best) > problem.budget:
            best = [int(np.argmin(b)) for b in nbytes]
        return dict(zip(problem.curves, spend(best, nbytes, damage, problem.budget - cost(best)), strict=True))
