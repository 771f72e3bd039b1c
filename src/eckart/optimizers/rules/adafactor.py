"""Adafactor: the second moment of a matrix kept as a product of its row and column means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from eckart.optimizers.rules.base import Direction, Rule
from eckart.optimizers.storage import State


@dataclass(frozen=True)
class Adafactor(Rule):
    """Adafactor with a given learning rate (Shazeer and Stern, ICML 2018, arXiv 1804.04235, algorithms 4 and 5).

    Args:
        decay: the mean of squares forgets by 1 - k^decay at the k-th update.
        eps: added to squared gradients.
        clip: directions whose root mean square exceeds it are scaled down to it.
    """

    decay: float = -0.8
    eps: float = 1e-30
    clip: float = 1.0
    buffers: ClassVar[tuple[str, ...]] = ("row_sq", "column_sq", "exp_avg_sq")
    squared: ClassVar[tuple[str, ...]] = buffers

    def __post_init__(self) -> None:
        if not self.decay < 0 or not self.eps > 0 or not self.clip > 0:
            raise ValueError(f"Adafactor needs decay < 0, eps > 0 and clip > 0, not {self.decay}, {self.eps}, {self.clip}")  # fmt: skip # noqa: E501

    @property
    def elementwise(self) -> bool:
        return False

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        if len(shape) < 2:
            return {"exp_avg_sq": shape}
        return {"row_sq": shape[:-1], "column_sq": (*shape[:-2], shape[-1])}

    def direction(self, state: State, R: Tensor, k: int) -> Direction:
        kept = 1 - float(k) ** self.decay
        squares = R.square().add_(self.eps)
        moments = self.moments(state, R)
        means = [squares] if R.dim() < 2 else [squares.mean(-1), squares.mean(-2)]
        moments = [V.mul_(kept).add_(mean, alpha=1 - kept) for V, mean in zip(moments, means, strict=True)]
        self.keep(state, R, moments)
        if R.numel() == 0:
            return Direction(R.clone(), 1.0)
        if R.dim() < 2:
            N = R * moments[0].rsqrt()
        else:
            rows, columns = moments
            N = R * (rows / rows.mean(-1, keepdim=True)).rsqrt()[..., None] * columns.rsqrt()[..., None, :]
        rms = N.square().mean().sqrt()
        return Direction(N / (rms / self.clip).clamp(min=1.0), 1.0)

    def turn(self, state: State, turned: object) -> None:
        raise ValueError("Adafactor's row and column means cannot be turned into a new basis: keep or reset them")
