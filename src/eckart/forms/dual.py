"""What a weight is worth to a domain, where moving what is worth much in general has its price (D-Pruner)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms.patterns import Anywhere, Pattern
from eckart.forms.selections import OBS, SELECTIONS, Choice, Scored
from eckart.linalg.weighting import Weighting


@SELECTIONS.word("dual")
@dataclass(frozen=True)
class Dual(Scored):
    """The largest first * |g̃ w| + second * (g̃ w)² + third * |w|³ (D-Pruner, arXiv 2405.06275, section 3).

    g̃ = g + 2 * generality * rate² * G g² / scale, with G = w² / [H⁻¹]_jj of a pass of the brain surgeon under the
    weight on inputs, and g² the weight of single squared errors, which is the mean squared gradient where the metric is
    Fisher's. As g is the root of a mean square it has no sign: terms of one weight do not cancel.

    Args:
        first, second, third: weights of the three terms of the Taylor expansion of the loss.
        generality: of the penalty on moving what is important in general.
        rate: of the steps of descent that the penalty is about.
        scale: by which the penalty's gradient is divided.
        sparsity: at which the surgeon passes over the matrix.
        damping: of the surgeon.
        blocks: of columns, each of which keeps its share; 1 compares the whole matrix.
    """

    first: float = 1.0
    second: float = 1 / 2000
    third: float = 1.0
    generality: float = 0.1
    rate: float = 0.03
    scale: float = 1000.0
    sparsity: float = 0.52
    damping: float = 0.01
    blocks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "per_row" and (not isinstance(value, int | float) or not 0 <= value < float("inf")):
                raise ValueError(f"dual({f.name}={value!r}): it is a number from 0 up")
        if not isinstance(self.blocks, int) or self.blocks < 1 or self.scale == 0 or self.sparsity >= 1:
            raise ValueError(f"{self}: blocks is a positive integer, the scale is not 0, and the sparsity is below 1")

    def general(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Float[Tensor, "out in"]:
        """G, from weights that have taken over what the surgeon dropped in blocks of columns before theirs."""
        pattern = Anywhere((W.shape[0], W.shape[1]), count=round((1 - self.sparsity) * W.numel()))
        inputs = Weighting(right=weighting.right)
        return OBS(damping=self.damping).surgeon(W, inputs)(pattern)[2]

    def gradient(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Float[Tensor, "out in"]:
        """g̃."""
        squared = weighting.importance((W.shape[0], W.shape[1])).to(W)
        g = squared.sqrt()
        if not self.generality:
            return g
        return g + 2 * self.generality * self.rate**2 * self.general(W, weighting) * squared / self.scale

    def scores(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Float[Tensor, "out in"]:
        step = self.gradient(W, weighting) * W.abs()
        return self.first * step + self.second * step.square() + self.third * W.abs() ** 3

    def chooser(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Callable[[Pattern], Choice]:
        scores = self.scores(W, weighting)

        def choose(pattern: Pattern) -> Choice:
            step = pattern.step(max(1, -(-W.shape[1] // self.blocks)))
            runs = range(0, W.shape[1], step)
            parts = [pattern.keep(scores[:, i : i + step], i, self.per_row) for i in runs]
            return torch.cat(parts, dim=1) if parts else torch.zeros_like(W, dtype=torch.bool), W

        return choose
