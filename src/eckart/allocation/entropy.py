"""Sparsity spread over blocks by influence, softened by an entropy term (MoDeGPT, arXiv 2408.09632, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eckart.allocation.base import ALLOCATORS, Allocator, Problem, best_share, largest_within


@ALLOCATORS.word("entropy")
@dataclass(frozen=True)
class Entropy(Allocator):
    """Block l loses the share L φ softmax(-s / temperature)_l of its bytes, where s_l is its influence.

    Args:
        temperature: the paper's ε, in the units of s, which lies in [0, 2]; larger is flatter.
        cap: no block loses more than this; the excess goes to the others.
    """

    temperature: float = 0.1
    cap: float = 0.8
    needs_influence = True

    def allocate(self, problem: Problem) -> dict[str, int]:
        if not problem.influence:
            raise ValueError("entropy allocation needs the influence of the blocks: calibrate on data first")

        def at(share: float) -> dict[str, int]:
            losses = sparsities(problem.influence, min(1.0 - share, self.cap), self.temperature, self.cap)
            kept = {name: 1 - losses[block] for name, block in problem.blocks.items()}
            return {n: largest_within(c, kept.get(n, 1.0) * c.nbytes[-1]) for n, c in problem.curves.items()}

        return best_share(problem, at)


def sparsities(influence: Sequence[float], mean: float, temperature: float, cap: float = 0.8) -> list[float]:
    """Shares to remove from every block: their mean is `mean`, none is above `cap`, or `ValueError`."""
    if not 0 <= mean <= cap:
        raise ValueError(f"a mean sparsity of {mean} is not between 0 and the cap of {cap}")
    s = torch.tensor(list(influence), dtype=torch.float64)
    phi = len(s) * mean * torch.softmax(-s / temperature, dim=0)
    for _ in range(len(s)):
        over = phi > cap
        excess = float((phi[over] - cap).sum())
        if excess <= 1e-12:
            break
        phi[over] = cap
        free = phi < cap
        room = phi[free]
        phi[free] = room + excess * (room / room.sum() if float(room.sum()) > 0 else 1 / free.sum())
    return phi.tolist()
