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

from eckart.allocation.additive import Additive, front, spend
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
        choice = within(nbytes, damage, problem.budget, self.resolution(problem))
        left = problem.budget - sum(float(b[i]) for b, i in zip(nbytes, choice, strict=True))
        return dict(zip(problem.curves, spend(choice, nbytes, damage, left), strict=True))


def within(
    costs: Sequence[Float[np.ndarray, " points"]],
    losses: Sequence[Float[np.ndarray, " points"]],
    budget: float,
    step: float,
) -> list[int]:
    """One point of every item with the least total loss at a total cost of at most `budget`, up to a resolution.

    Either side may be bytes and the other errors. What an item costs beyond its cheapest point is rounded up to whole
    steps. With the same step, a larger budget never gives a larger loss. Raises `ValueError` where nothing fits.
    """
    least = [float(c.min()) for c in costs]
    if budget < sum(least):
        raise ValueError(f"no choice costs at most {budget}: the cheapest one costs {sum(least)}")
    room = int((budget - sum(least)) // step)
    # what costs more than there is room for need not be counted exactly, and might be no integer
    extra = [np.minimum(np.ceil((c - low) / step), room + 1).astype(np.int64) for c, low in zip(costs, least, strict=True)]  # fmt: skip # noqa: E501
    return knapsack(extra, losses, min(room, sum(int(e.max()) for e in extra)))


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
