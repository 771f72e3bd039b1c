"""The least total error under a budget as an integer linear program (LQ-LoRA, arXiv 2311.12023, section 3.2)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from eckart.allocation.additive import Additive, front
from eckart.allocation.base import ALLOCATORS, Problem


@ALLOCATORS.word("integer_program")
@dataclass(frozen=True)
class IntegerProgram(Additive):
    """One binary variable for each weight and point, one point for each weight, bytes within the budget; by HiGHS.

    Points that others beat in bytes and damage are left out first, and damages are scaled to at most one.

    Args:
        seconds: after which the best choice so far is taken. Where that happens, the choice depends on the machine.
    """

    seconds: float = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seconds > 0:
            raise ValueError(f"integer_program(seconds={self.seconds!r}): the time limit is positive")

    def allocate(self, problem: Problem) -> dict[str, int]:
        nbytes, damage = self.table(problem)
        kept = [front(b, d) for b, d in zip(nbytes, damage, strict=True)]
        costs = [b[k] for b, k in zip(nbytes, kept, strict=True)]
        losses = [d[k] for d, k in zip(damage, kept, strict=True)]
        allowed = float(problem.budget)
        while True:
            found = _solve(costs, losses, allowed, self.seconds)
            spent = sum(float(c[i]) for c, i in zip(costs, found, strict=True))
            if spent <= problem.budget:
                return {name: int(k[i]) for name, k, i in zip(problem.curves, kept, found, strict=True)}
            allowed -= spent - problem.budget  # the solver's tolerance is not ours


def _solve(
    costs: list[Float[np.ndarray, " points"]], losses: list[Float[np.ndarray, " points"]], budget: float, seconds: float
) -> list[int]:
    """For every item the index of its point. Raises `RuntimeError` where the solver finds none."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(c) for c in costs]
    item = np.repeat(np.arange(len(sizes)), sizes)
    member = csr_array((np.ones(len(item)), (item, np.arange(len(item)))), shape=(len(sizes), len(item)))
    least = sum(float(c.min()) for c in costs)
    extra = np.concatenate([c - c.min() for c in costs])
    loss = np.concatenate(losses)
    found = milp(
        loss / (np.abs(loss).max() or 1.0),
        integrality=np.ones(len(item)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(member, 1, 1), LinearConstraint(extra[None], -np.inf, budget - least)],
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"the integer program found no choice in {seconds} s ({found.message}): allow more seconds, or use dynamic_programming()")  # fmt: skip # noqa: E501
    ends = np.cumsum([0, *sizes])
    return [int(np.argmax(found.x[a:b])) for a, b in itertools.pairwise(ends)]
