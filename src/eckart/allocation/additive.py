"""What allocators share that add up a damage for every weight."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eckart.allocation.base import Allocator, Problem
from eckart.forms.base import Curve

Numbers = np.ndarray


@dataclass(frozen=True)
class Additive(Allocator):
    """An allocator that takes the damage done to the model for the sum of the damages of its weights.

    Args:
        damage: `error` adds up errors as the metric states them (right for metrics in units of the loss); `relative`
            divides each by the energy of its weight.
    """

    damage: str = "relative"

    def __post_init__(self) -> None:
        if self.damage not in ("error", "relative"):
            raise ValueError(f"{self.word}(damage={self.damage!r}): it is 'error' or 'relative'")  # type: ignore[attr-defined]

    def table(self, problem: Problem) -> tuple[list[Numbers], list[Numbers]]:
        """For every weight in order: bytes of its points (float64, whole), and their damage."""
        curves = problem.curves.values()
        return [np.asarray(c.nbytes, dtype=np.float64) for c in curves], [self.damages(c) for c in curves]

    def damages(self, curve: Curve) -> Numbers:
        """The damage of every point of a curve."""
        scale = curve.energy if self.damage == "relative" and curve.energy > 0 else 1.0
        return np.asarray(curve.errors, dtype=np.float64) / scale


def cheapest(nbytes: Sequence[Numbers], damage: Sequence[Numbers]) -> list[int]:
    """The cheapest point of every weight; of equally cheap ones the one that does least damage."""
    return [int(np.lexsort((d, b))[0]) for b, d in zip(nbytes, damage, strict=True)]


def spend(choice: Sequence[int], nbytes: Sequence[Numbers], damage: Sequence[Numbers], left: float) -> list[int]:
    """The choice after `left` more bytes went, step by step, where a byte gains most, until nothing affordable gains.

    What is affordable only becomes less, so the rates in the heap are never too low and are looked at again when due.
    """
    made = list(choice)
    heap: list[tuple[float, int, int]] = []

    def offer(k: int) -> None:
        extra, gain = nbytes[k] - nbytes[k][made[k]], damage[k][made[k]] - damage[k]
        rate = np.where((extra <= left) & (gain > 0), gain / np.maximum(extra, 1e-9), -1.0)
        if rate.size and rate.max() > 0:
            j = int(np.argmax(rate))
            heapq.heappush(heap, (-float(rate[j]), -k, j))

    for k in range(len(made)):
        offer(k)
    while heap:
        _, minus, j = heapq.heappop(heap)
        k = -minus
        extra = nbytes[k][j] - nbytes[k][made[k]]
        if extra <= left:
            left -= extra
            made[k] = j
        offer(k)
    return made


def front(nbytes: Numbers, damage: Numbers) -> Numbers:
    """Indices of the points that no other one beats in both bytes and damage, cheapest first."""
    order = np.lexsort((damage, nbytes))
    best = np.minimum.accumulate(damage[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = best[1:] < best[:-1]
    return order[first]
