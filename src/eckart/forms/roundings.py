"""Roundings: how the codes of a matrix are chosen once its grid is known, or together with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eckart.forms.base import FORMS
from eckart.forms.language import Vocabulary
from eckart.linalg.weighting import Weighting

ROUNDINGS: Vocabulary[Rounding] = Vocabulary("rounding", within=FORMS)
GroupParameters = dict[str, Float[Tensor, "out groups k"]]


class Quantiser(Protocol):
    """A grid with its bits and groups, applied to a whole matrix. Parameters come back as they will be stored."""

    group: int

    def parameters(
        self, W: Float[Tensor, "out in"], weight: Float[Tensor, "#out in"] | None = None
    ) -> GroupParameters: ...

    def encode(self, W: Float[Tensor, "out in"], p: GroupParameters) -> UInt8[Tensor, "out in"]: ...

    def decode(self, codes: UInt8[Tensor, "out in"], p: GroupParameters) -> Float[Tensor, "out in"]: ...

    def column(
        self, w: Float[Tensor, " out"], j: int, p: GroupParameters
    ) -> tuple[UInt8[Tensor, " out"], Float[Tensor, " out"]]: ...


@dataclass(frozen=True)
class Rounding(ABC):
    """Chooses codes (out, in) and the grid's parameters for a matrix."""

    def __str__(self) -> str:
        return ROUNDINGS.print(self)

    @abstractmethod
    def round(
        self, W: Float[Tensor, "out in"], weighting: Weighting, quantiser: Quantiser
    ) -> tuple[UInt8[Tensor, "out in"], GroupParameters]:
        """Codes, and the parameters as stored, with a small || Lᵀ (W - decoded) R ||."""


@ROUNDINGS.word("nearest")
@dataclass(frozen=True)
class Nearest(Rounding):
    """Every weight to the nearest number of its grid. A grid that searches does so under the diagonal of the weight."""

    def round(
        self, W: Float[Tensor, "out in"], weighting: Weighting, quantiser: Quantiser
    ) -> tuple[UInt8[Tensor, "out in"], GroupParameters]:
        p = quantiser.parameters(W, weighting.importance((W.shape[0], W.shape[1])).to(W))
        return quantiser.encode(W, p), p


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

    def round(
        self, W: Float[Tensor, "out in"], weighting: Weighting, quantiser: Quantiser
    ) -> tuple[UInt8[Tensor, "out in"], GroupParameters]:
        p = quantiser.parameters(W, weighting.importance((W.shape[0], W.shape[1])).to(W))
        codes = torch.zeros(W.shape, dtype=torch.uint8, device=W.device)
        columns, U = feedback(weighting.right.gram(W.shape[1]), self.order, self.damping)
        rest = W.to(torch.promote_types(W.dtype, torch.float32)).clone()[:, columns]
        U = U.to(rest)
        for start in range(0, W.shape[1], self.block):
            end = min(start + self.block, W.shape[1])
            errors = rest.new_zeros(W.shape[0], end - start)
            for i in range(start, end):
                j = int(columns[i])
                codes[:, j], value = quantiser.column(rest[:, i], j, p)
                error = (rest[:, i] - value) / U[i, i]
                rest[:, i:end] -= error[:, None] * U[i, i:end]
                errors[:, i - start] = error
            rest[:, end:] -= errors @ U[start:end, end:]
        return codes, p


def feedback(C: Float[Tensor, "in in"], order: str, damping: float) -> tuple[Tensor, Float[Tensor, "in in"]]:
    """The order of columns, and the upper Cholesky factor of the inverse of C in that order, in float64.

    Inputs that are never active get the mean weight, so that their columns are rounded to nearest.
    """
    C = C.double().clone()
    diagonal = C.diagonal()
    diagonal.copy_(torch.where(diagonal > 0, diagonal, 1.0 if not bool((diagonal > 0).any()) else diagonal.mean()))
    columns = torch.arange(C.shape[0], device=C.device)
    if order == "activation":
        columns = diagonal.sort(descending=True, stable=True).indices
    diagonal.add_(damping * diagonal.mean() if C.shape[0] else 0.0)
    C = C[columns][:, columns]
    L = torch.linalg.cholesky(C)
    return columns, torch.linalg.cholesky(torch.cholesky_inverse(L), upper=True)
