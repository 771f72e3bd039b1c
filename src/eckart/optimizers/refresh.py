"""Refresh policies: at which steps a parameter's subspace is chosen anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eckart.optimizers.modes import Factors
from eckart.optimizers.storage import State


@dataclass(frozen=True)
class Every:
    """Every T updates of a parameter, from its first one on (T is `interval` of its group).

    Args:
        stagger: spread the refreshes of all parameters over the T steps, so that no step has to do all of them.
    """

    stagger: bool = False

    def due(self, state: State) -> bool:
        return state["step"] >= state.get("next_refresh", 0)

    def done(self, state: State, interval: int, old: Factors, new: Factors, index: int, count: int) -> None:
        """Note a refresh, and decide when the next one is; `index` of `count` is the parameter's place."""
        wait = self.wait(state, interval, old, new)
        if self.stagger and "next_refresh" not in state:
            wait = max(1, wait - wait * index // count)
        state["next_refresh"] = state["step"] + wait
        state["refreshes"] = state.get("refreshes", 0) + 1

    def wait(self, state: State, interval: int, old: Factors, new: Factors) -> int:
        """Steps until the next refresh."""
        return interval


@dataclass(frozen=True)
class Lazy(Every):
    """Each parameter doubles its own interval while its leading direction stands still (Q-GaLore, section 3.2).

    Args:
        threshold: the mean |cosine| of successive leading directions from which on a subspace counts as settled.
        queue: how many cosines the mean is over; there is no decision before there are so many.
        factor: by which the interval grows.
    """

    threshold: float = 0.4
    queue: int = 5
    factor: float = 2.0

    def __post_init__(self) -> None:
        if self.queue < 1 or self.factor < 1:
            raise ValueError(f"a lazy refresh needs a queue of at least 1 and a factor of at least 1, not {self.queue} and {self.factor}")  # fmt: skip # noqa: E501

    def wait(self, state: State, interval: int, old: Factors, new: Factors) -> int:
        state.setdefault("interval", interval)
        if old:
            mode = min(new)
            before, now = old[mode], new[mode]
            if not now.is_floating_point():
                raise TypeError("a lazy refresh compares directions, and this projector only selects: use Every()")
            # a singular vector's sign is arbitrary: only the size of the cosine means anything
            cosine = torch.nn.functional.cosine_similarity(before[:, 0].float(), now[:, 0].float(), dim=0).abs()
            cosines = [*state.get("cosines", ()), float(cosine)][-self.queue :]
            if len(cosines) == self.queue and sum(cosines) / self.queue >= self.threshold:
                state["interval"] = int(self.factor * state["interval"])
            state["cosines"] = tuple(cosines)
        return state["interval"]
