"""Adam: a mean of gradients over the root of a mean of their squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from eckart.optimizers.checks import check_betas, check_not_negative
from eckart.optimizers.rules.base import Direction, Rule
from eckart.optimizers.storage import Blocks, Dynamic, Plain, State, Storage


@dataclass(frozen=True)
class Adam(Rule):
    """N = M / (sqrt(V) + eps), with the bias corrections sqrt(1 - b2^k) / (1 - b1^k) in the step size.

    Args:
        betas: of the means of gradients and of their squares.
        eps: added to sqrt(V).
        eps_corrected: eps is multiplied by sqrt(1 - b2^k) first, as in torch's AdamW; GaLore and Fira add it as it is.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_corrected: bool = True
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    squared: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def __post_init__(self) -> None:
        check_betas(self.betas)
        check_not_negative("eps", self.eps)

    def direction(self, state: State, R: Tensor, k: int) -> Direction:
        b1, b2 = self.betas
        M, V = self.moments(state, R)
        M = M.mul_(b1).add_(R, alpha=1 - b1)
        V = V.mul_(b2).addcmul_(R, R, value=1 - b2)
        self.keep(state, R, [M, V])
        eps, gain = self._corrections(k)
        return Direction(M / V.sqrt().add_(eps), gain)

    def directions(self, states: Sequence[State], Rs: Sequence[Tensor], ks: Sequence[int]) -> list[Direction]:
        if not isinstance(self.storage, Plain) or len(Rs) < 2:
            return super().directions(states, Rs, ks)
        b1, b2 = self.betas
        Rs = list(Rs)
        Ms, Vs = (list(each) for each in zip(*map(self.moments, states, Rs), strict=True))
        torch._foreach_mul_(Ms, b1)
        torch._foreach_add_(Ms, Rs, alpha=1 - b1)
        torch._foreach_mul_(Vs, b2)
        torch._foreach_addcmul_(Vs, Rs, Rs, value=1 - b2)
        for state, R, M, V in zip(states, Rs, Ms, Vs, strict=True):
            self.keep(state, R, [M, V])
        epsilons, gains = zip(*map(self._corrections, ks), strict=True)
        denominators = torch._foreach_sqrt(Vs)
        torch._foreach_add_(denominators, list(epsilons))
        return list(map(Direction, torch._foreach_div(Ms, denominators), gains))

    def _corrections(self, k: int) -> tuple[float, float]:
        """eps as it is added to sqrt(V), and the gain."""
        b1, b2 = self.betas
        root = math.sqrt(1 - b2**k)
        return self.eps * (root if self.eps_corrected else 1.0), root / (1 - b1**k)


@dataclass(frozen=True)
class Adam8bit(Adam):
    """Adam with both moments in blocks of 8-bit codes (8-bit optimizers, arXiv 2110.02861).

    The second moment is kept as its square root: an entry of the first moment then never outlives it.
    """

    storage: Storage = field(default_factory=lambda: Blocks(8, 256, Dynamic()), kw_only=True)
    roots: Storage = field(default_factory=lambda: Blocks(8, 256, Dynamic(signed=False), root=True), kw_only=True)

    def stored(self, name: str) -> Storage:
        return self.roots if name in self.squared else self.storage
