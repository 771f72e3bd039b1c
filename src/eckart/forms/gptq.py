"""Rounding with error feedback: each column's error is made up for by the columns that are not yet rounded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from eckart.forms.roundings import ROUNDINGS, Quantiser, Rounding, Stored, column_weights
from eckart.linalg.feedback import Feedback, feedback
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import Damped
from eckart.remarks import remark


@ROUNDINGS.word("gptq")
@dataclass(frozen=True)
class GPTQ(Rounding):
    """Column by column, each one's error moved into the columns not yet rounded (GPTQ, arXiv 2210.17323, algorithm 1).

    The grid's parameters are those of the matrix before (static groups), so that columns may be taken in any order
    and no permutation is stored. Weights on outputs do not matter where they are diagonal, and are not used.

    Args:
        order: `activation` takes columns by descending weight, `given` as they stand.
        damping: added to the diagonal of the weight on inputs, relative to its mean.
        block: columns whose errors are moved on together; the result does not depend on it.
    """

    order: str = "activation"
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        if self.order not in ("activation", "given"):
            raise ValueError(f"gptq(order={self.order!r}): it is 'activation' or 'given'")
        if not isinstance(self.damping, int | float) or not 0 <= self.damping < math.inf:
            raise ValueError(f"gptq(damping={self.damping!r}): it is a share of the mean diagonal, from 0 up")
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"gptq(block={self.block!r}): it is a positive number of columns")

    def round(
        self, W: Float[Tensor, "out in"], weighting: Weighting, quantiser: Quantiser
    ) -> tuple[UInt8[Tensor, "out in"], Stored]:
        p = quantiser.parameters(W, column_weights(W, weighting))
        return sweep(W, p, quantiser, self.feedback(weighting, W.shape[1]), self.block).codes, p

    def feedback(self, weighting: Weighting, width: int) -> Feedback:
        """How errors of columns are moved on; more damping than was asked for is said."""
        C, tried = weighting.right.gram(width), float(self.damping)
        while True:
            try:
                found = feedback(C, self.order, tried)
            except torch.linalg.LinAlgError:
                tried = max(10 * tried, 1e-9)
                if tried >= 1:
                    raise ValueError(f"{self}: the weight on inputs is not positive semi-definite") from None
                continue
            if tried > self.damping:
                remark(f"the weight on inputs is singular: {self} damps it by {tried:.0e} of its mean", Damped)
            return found


class Sweep(NamedTuple):
    """What a sweep over all columns found.

    Attributes:
        codes: of every weight.
        moved: the weights as they were when their turn came, with the errors of earlier columns in them.
        kept: which of them were left as they were, exact.
    """

    codes: UInt8[Tensor, "out in"]
    moved: Float[Tensor, "out in"]
    kept: Bool[Tensor, "out in"]


def sweep(
    W: Float[Tensor, "out in"], p: Stored, quantiser: Quantiser, moves: Feedback, block: int = 128,
    threshold: float = math.inf,
) -> Sweep:  # fmt: skip
    """Round all columns in order, moving errors on.

    Args:
        threshold: weights whose rounding would raise the squared error by more stay exact (SpQR's outliers).
    """
    columns, U = moves.columns, moves.U.to(W)
    places = columns.tolist()
    rest = W.T[columns].contiguous()  # a column is contiguous, in the order of rounding
    codes = torch.zeros(rest.shape, dtype=torch.uint8, device=W.device)
    kept = torch.zeros(rest.shape, dtype=torch.bool, device=W.device)
    for start in range(0, len(places), block):
        end = min(start + block, len(places))
        errors = rest.new_zeros(end - start, W.shape[0])
        for i in range(start, end):
            codes[i], value = quantiser.column(rest[i], places[i], p)
            error = (rest[i] - value) / U[i, i]
            if threshold < math.inf:
                torch.gt(error.square(), threshold, out=kept[i])
                error = error.masked_fill(kept[i], 0.0)
            rest[i + 1 : end].addr_(U[i, i + 1 : end], error, alpha=-1)
            errors[i - start] = error
        rest[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    back = torch.argsort(columns)
    return Sweep(codes[back].T.contiguous(), rest[back].T.contiguous(), kept[back].T.contiguous())
