"""The least total error under a budget when errors add up: a Lagrange multiplier found by bisection."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eckart.allocation.base import ALLOCATORS, Allocator, Problem


@ALLOCATORS.word("optimal")
@dataclass(frozen=True)
class Optimal(Allocator):
    """Minimises sum of damage + λ bytes for each weight by itself, and bisects λ until the budget is met.

    The choice is optimal among all that lie on the curves' convex hulls (Everett, 1963); what the hulls leave of the
    budget is then spent greedily on the best remaining gains.

    Args:
        damage: `error` adds up errors as the metric states them (right for metrics in units of the loss); `relative`
            divides each by the energy of its weight.
    """

    damage: str = "relative"

    def __post_init__(self) -> None:
        if self.damage not in ("error", "relative"):
            raise ValueError(f"optimal(damage={self.damage!r}): it is 'error' or 'relative'")

    def allocate(self, problem: Problem) -> dict[str, int]:
        names = list(problem.curves)
        nbytes = [np.asarray(problem.curves[n].nbytes, dtype=np.float64) for n in names]
        damage = [self._damage(problem, n) for n in names]

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
        return dict(zip(names, self._fill(best, nbytes, damage, problem.budget - cost(best)), strict=True))

    def _damage(self, problem: Problem, name: str) -> np.ndarray:
        curve = problem.curves[name]
        scale = curve.energy if self.damage == "relative" and curve.energy > 0 else 1.0
        return np.asarray(curve.errors, dtype=np.float64) / scale

    def _fill(self, choice: list[int], nbytes: list[np.ndarray], damage: list[np.ndarray], left: float) -> list[int]:
        """Spend what is left on the steps with the most gain for a byte."""
        while True:
            best = (0.0, -1, -1)
            for k, i in enumerate(choice):
                extra, gain = nbytes[k] - nbytes[k][i], damage[k][i] - damage[k]
                able = (extra <= left) & (gain > 0)
                if able.any():
                    rate = np.where(able, gain / np.maximum(extra, 1e-9), -1.0)
                    j = int(np.argmax(rate))
                    best = max(best, (float(rate[j]), k, j))
            if best[1] < 0:
                return choice
            _, k, j = best
            left -= nbytes[k][j] - nbytes[k][choice[k]]
            choice[k] = j
