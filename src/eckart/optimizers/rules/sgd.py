"""Gradient descent with and without momentum, and the rule without a direction of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from eckart.optimizers.rules.base import Direction, Rule
from eckart.optimizers.storage import State


@dataclass(frozen=True)
class SGD(Rule):
    """N = R, or with a momentum mu the sum M <- mu M + R.

    Args:
        momentum: mu, from 0 to below 1; nothing is kept where it is 0.
    """

    momentum: float = 0.0
    buffers: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"a momentum is from 0 to below 1, not {self.momentum}")

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return super().shapes(shape) if self.momentum else {}

    def direction(self, state: State, R: Tensor, k: int) -> Direction:
        if not self.momentum:
            return Direction(R, 1.0)
        (M,) = self.moments(state, R)
        M = M.mul_(self.momentum).add_(R)
        self.keep(state, R, [M])
        return Direction(M, 1.0)
