"""Codes for nearly all weights, and the few that they would hurt most kept exact beside them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from eckart.forms.algebra import RUNGS_OF_A_SUM, SumMatrix, thin
from eckart.forms.base import FORMS, Form, Shape
from eckart.forms.gptq import GPTQ, Sweep, sweep
from eckart.forms.grids import ends
from eckart.forms.quantized import Groups, Quantized
from eckart.forms.roundings import Stored, column_weights
from eckart.forms.sparse import Sparse
from eckart.linalg.feedback import Feedback
from eckart.linalg.weighting import PLAIN, Weighting

TURNS, TRIES = 10, 10
SETTLED = 1e-4
FULL_ENOUGH = 0.97


@FORMS.word("with_outliers")
@dataclass(frozen=True)
class WithOutliers(Form):
    """dense + sparse, where the outliers are chosen together with the codes and take no part in choosing the grid.

    A plain sum lets each term repair the other, but the largest weights stretch the grid before the sparse term sees
    them. Where codes are rounded by error feedback, weights stay exact whose rounding would raise the error by more
    than a threshold, the one that the density allows (SpQR, arXiv 2306.03078, algorithm 1). Otherwise codes and
    outliers take turns under the weights of single errors: the grid is fitted without the outliers, and the worst
    errors become the next ones, as long as that helps (SqueezeLLM's dense-and-sparse split, arXiv 2306.07629).

    Args:
        dense: the codes.
        sparse: how many outliers; which ones is decided here, so its selection is not.
    """

    dense: Quantized = field(default_factory=Quantized)
    sparse: Sparse = field(default_factory=lambda: Sparse(density=0.01))

    def __post_init__(self) -> None:
        if not isinstance(self.dense, Quantized):
            raise ValueError(f"with_outliers(dense={self.dense}): the dense part is quantized(...)")
        if not isinstance(self.sparse, Sparse):
            raise ValueError(f"with_outliers(sparse={self.sparse}): the sparse part is sparse(...)")
        if self.sparse != Sparse(self.sparse.density):
            raise ValueError(f"with_outliers(sparse={self.sparse}): outliers are chosen by their errors, leave the selection out")  # fmt: skip # noqa: E501

    @property
    def terms(self) -> tuple[Quantized, Sparse]:
        return (self.dense, self.sparse)

    @property
    def open(self) -> bool:
        return any(term.open for term in self.terms)

    def ladder(self, shape: Shape) -> list[Form]:
        per_term = max(2, round(RUNGS_OF_A_SUM ** (1 / max(1, sum(term.open for term in self.terms)))))
        rungs = itertools.product(*(thin(term.ladder(shape), per_term) for term in self.terms))
        made: list[dict[str, Any]] = [{"dense": dense, "sparse": sparse} for dense, sparse in rungs]
        return [replace(self, **settings) for settings in made]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> SumMatrix:
        return SumMatrix([term.build(shape, dtype=dtype, device=device) for term in self.terms], self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> SumMatrix:
        W = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        count = self.sparse.pattern((W.shape[0], W.shape[1])).places.count
        at = Groups(self.dense, W.shape[1], dtype or matrix.dtype)
        if isinstance(self.dense.rounding, GPTQ):
            found, p = swept(W, weighting, at, self.dense.rounding, count)
            codes, target, kept = found
        else:
            codes, p, kept = in_turns(W, weighting, at, count)
            target = W
        rest = torch.where(kept, target - at.decode(codes, p), 0.0)
        exact = self.sparse.fit(rest, PLAIN, dtype=dtype or matrix.dtype)
        return SumMatrix([self.dense.assembled(codes, p, at), exact], self)


def in_turns(
    W: Float[Tensor, "out in"], weighting: Weighting, at: Groups, count: int
) -> tuple[UInt8[Tensor, "out in"], Stored, Bool[Tensor, "out in"]]:
    """Codes, parameters and the places of `count` outliers, by turns; the first are far from their group's mean."""
    importance = weighting.importance((W.shape[0], W.shape[1])).to(W)
    means = at.split(W).mean(-1, keepdim=True) if W.numel() else at.split(W)
    outliers = largest(importance * (W - at.joined(means.expand_as(at.split(W)))).square(), count)
    best, least = None, math.inf
    for _ in range(TURNS):
        single = Weighting(weighting.left, weighting.right, each=importance.masked_fill(outliers, 0.0))
        codes, p = at.form.rounding.round(W, single, at)
        errors = importance * (W - at.decode(codes, p)).square()
        error = float(errors.masked_fill(outliers, 0.0).sum(dtype=torch.float64))
        if best is not None and error >= least * (1 - SETTLED):
            break
        best, least = (codes, p, outliers), error
        outliers = largest(errors, count)
    assert best is not None
    return best


def swept(
    W: Float[Tensor, "out in"], weighting: Weighting, at: Groups, rounding: GPTQ, count: int
) -> tuple[Sweep, Stored]:
    """A sweep that keeps as many weights exact as possible, up to `count`, and its parameters."""
    moves = rounding.feedback(weighting, W.shape[1])
    gains = reductions(W, at, moves)
    threshold, low, high = float(gains.flatten().topk(count).values.min()) if count else math.inf, 0.0, math.inf
    best = None
    for _ in range(TRIES):
        found, p = swept_at(W, weighting, at, rounding, moves, gains, threshold)
        used = int(found.kept.sum())
        if used <= count:
            best, high = (found, p), threshold
            if used >= FULL_ENOUGH * count:
                break
        else:
            low = threshold
        threshold = high / 4 if low == 0 else 4 * low if high == math.inf else math.sqrt(low * high)
    return best or swept_at(W, weighting, at, rounding, moves, gains, math.inf)


def swept_at(
    W: Float[Tensor, "out in"], weighting: Weighting, at: Groups, rounding: GPTQ, moves: Feedback,
    gains: Float[Tensor, "out in"], threshold: float,
) -> tuple[Sweep, Stored]:  # fmt: skip
    """The grids without the weights that gain more than the threshold when left out; then the sweep with it."""
    weight = column_weights(W, weighting).expand_as(W).masked_fill(gains > threshold, 0.0)
    p = at.parameters(W, weight)
    return sweep(W, p, at, moves, rounding.block, threshold), p


def reductions(W: Float[Tensor, "out in"], at: Groups, moves: Feedback) -> Float[Tensor, "out in"]:
    """How much less the squared error of a group is, each column's in units of what feedback leaves of it, without a
    weight. Of all weights only the ends of the group's range change the grid when they go."""
    inverse = W.new_ones(1, W.shape[1])
    inverse[0, moves.columns] = 1 / moves.U.diagonal().to(W).square()
    x, scale = at.split(W), at.split(inverse) * at.inside(W)

    def errors(weight: Tensor | None) -> Tensor:
        p = at.grid.unsearched.fit(x, at.bits, weight)
        return scale * (x - at.grid.decode(at.grid.encode(x, p, at.bits), p, at.bits)).square()

    inside = at.inside(W).expand_as(x)
    base = errors(inside)
    found = base.clone()
    for end in ends(x, inside):
        first = (x == end) & (inside > 0)
        first &= first.cumsum(-1) == 1
        without = errors(inside.masked_fill(first, 0.0)).masked_fill(first, 0.0)
        gain = base.sum(-1, keepdim=True) - without.sum(-1, keepdim=True)
        found = torch.where(first, gain, found)
    return at.joined(found)


def largest(scores: Float[Tensor, "out in"], count: int) -> Bool[Tensor, "out in"]:
    """Where the `count` largest are; of equal ones the first."""
    order = scores.flatten().sort(descending=True, stable=True).indices[:count]
    return torch.zeros_like(scores, dtype=torch.bool).flatten().index_fill(0, order, True).view_as(scores)
