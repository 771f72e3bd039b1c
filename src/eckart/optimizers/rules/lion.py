"""The Lion-K rule: a subgradient of a convex function at an interpolated momentum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from eckart.optimizers.checks import check_betas
from eckart.optimizers.convex import L1, Convex
from eckart.optimizers.rules.base import Direction, Rule
from eckart.optimizers.storage import State


@dataclass(frozen=True)
class Lion(Rule):
    """N = dK(b1 M + (1 - b1) R), then M <- b2 M + (1 - b2) R; Lion itself where K is the 1-norm.

    Args:
        betas: b1 of the interpolation and b2 of the momentum.
        kernel: the convex function K.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    kernel: Convex = field(default_factory=L1)
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __post_init__(self) -> None:
        check_betas(self.betas)

    @property
    def elementwise(self) -> bool:
        return self.kernel.elementwise

    def direction(self, state: State, R: Tensor, k: int) -> Direction:
        b1, b2 = self.betas
        (M,) = self.moments(state, R)
        N = self.kernel.subgradient(b1 * M + (1 - b1) * R)
        self.keep(state, R, [M.mul_(b2).add_(R, alpha=1 - b2)])
        return Direction(N, 1.0)
