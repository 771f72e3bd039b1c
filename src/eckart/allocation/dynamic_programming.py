"""The least total error under a budget when errors add up: the knapsack, solved over all amounts that may be spent.

The recurrence of RD_PRUNE (arXiv 2308.10438, section 3.3), L-GreCo and SPDY: weights one after the other, the state
being what the weights so far may spend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from eckart.allocation.additive import Additive, cheapest, front, spend
from eckart.allocation.base import ALLOCATORS, Problem


@ALLOCATORS.word("dynamic_programming")
@dataclass(frozen=True)
class DynamicProgramming(Additive):
    """The best choice of all, up to a resolution in bytes; curves need not be convex.

    What every weight costs beyond its cheapest point is rounded up to whole steps of `resolution` bytes, so that the
    budget holds; what the rounding leaves is then spent greedily. The damage is at most that of the best choice for
    a budget smaller by one step and one step for each weight, and the least of all where the resolution divides all
    costs.

    Args:
        steps: into which the bytes beyond the cheapest choice are divided, at most; the table has as many columns.
    """

    steps: int = 16384

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"dynamic_programming(steps={self.steps!r}): the number of steps is a positive integer")

    def resolution(self, problem: Problem) -> int:
        """Bytes of one step: a multiple of what divides every difference of costs."""
        common = math.gcd(*(n - min(c.nbytes) for c in problem.curves.values() for n in c.nbytes)) or 1
        spare = problem.budget - problem.smallest
        largest = sum(max(c.nbytes) - min(c.nbytes) for c in problem.curves.values())
        return common * max(1, math.ceil(min(spare, largest) / (common * self.steps)))

    def allocate(self, problem: Problem) -> dict[str, int]:
        nbytes, damage = self.table(problem)
        least = [b[i] for b, i in zip(nbytes, cheapest(nbytes, damage), strict=True)]
        step = self.resolution(problem)
        extra = [np.ceil((b - low) / step).astype(np.int64) for b, low in zip(nbytes, least, strict=True)]
        most = sum(int(e.max()) for e in extra)
        choice = knapsack(extra, damage, min((problem.budget - problem.smallest) // step, most))
        left = problem.budget - sum(float(b[i]) for b, i in zip(nbytes, choice, strict=True))
        return dict(zip(problem.curves, spend(choice, nbytes, damage, left), strict=True))


def knapsack(
    costs: Sequence[Int[np.ndarray, " points"]], losses: Sequence[Float[np.ndarray, " points"]], capacity: int
) -> list[int]:
    """One point of every item with the least total loss at a total cost of at most `capacity`; cheaper where they tie.

    Costs are whole numbers from 0; either side may be bytes and the other errors. Time is points x capacity, and one
    index is kept for every item and capacity. Raises `ValueError` where no choice fits.
    """
    best = np.zeros(capacity + 1)
    taken: list[Int[np.ndarray, " capacity"]] = []
    for cost, loss in zip(costs, losses, strict=True):
        after = np.full(capacity + 1, np.inf)
        index = np.zeros(capacity + 1, dtype=np.int32)
        for i in front(cost, loss):
            c = int(cost[i])
            if c > capacity:
                break
            total = best[: capacity + 1 - c] + loss[i]
            better = total < after[c:]
            np.copyto(after[c:], total, where=better)
            index[c:][better] = i
        best = after
        taken.append(index)
    if not np.isfinite(best[capacity]):
        raise ValueError(f"no choice costs at most {capacity}")
    at, choice = int(np.argmax(best == best[capacity])), []
    for cost, index in zip(reversed(costs), reversed(taken), strict=True):
        choice.append(int(index[at]))
        at -= int(cost[choice[-1]])
    return choice[::-1]
