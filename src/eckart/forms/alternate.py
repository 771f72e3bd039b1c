"""Codes and scales by turns: each is best for the other, and the error never rises."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eckart.forms.gptq import GPTQ, sweep
from eckart.forms.roundings import ROUNDINGS, GroupParameters, Quantiser, Rounding, Stored, column_weights
from eckart.linalg.weighting import Weighting

CHUNK = 2**23
SETTLED = 1e-4


@ROUNDINGS.word("alternate")
@dataclass(frozen=True)
class Alternate(Rounding):
    """Codes by error feedback for given scales and offsets, these in closed form for given codes, and again.

    decoupleQ, arXiv 2404.12759: with codes held fixed the numbers of any grid are linear in its floating
    point parameters, whose best values under the weight on inputs solve one small linear system a row. Of every step a
    row keeps what is better (all rows together where their scales are not stored one by one). The start is the better
    of the grid's whole range and its searched one, each rounded to nearest and by feedback.

    Args:
        steps: the most turns; the last ones are left out once one improves fewer than 1 in 10,000 rows.
        codes: how codes are chosen for given parameters.
    """

    steps: int = 4
    codes: GPTQ = field(default_factory=GPTQ)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"alternate(steps={self.steps!r}): the number of turns is 0 or more")
        if not isinstance(self.codes, GPTQ):
            raise ValueError(f"alternate(codes={self.codes!s}): codes are chosen by gptq(...)")

    def round(
        self, W: Float[Tensor, "out in"], weighting: Weighting, quantiser: Quantiser
    ) -> tuple[UInt8[Tensor, "out in"], Stored]:
        C = weighting.right.gram(W.shape[1]).to(W.device)
        moves, weight = self.codes.feedback(weighting, W.shape[1]), column_weights(W, weighting)

        def swept(p: Stored) -> UInt8[Tensor, "out in"]:
            return sweep(W, p, quantiser, moves, self.codes.block).codes

        whole = quantiser.parameters(W, weight, searched=False)
        best = _Best(W, C, quantiser, quantiser.encode(W, whole), whole)
        best.offer(swept(whole))
        searched = quantiser.parameters(W, weight)
        best.offer(quantiser.encode(W, searched), searched)
        best.offer(swept(searched), searched)
        for _ in range(self.steps):
            before = best.errors
            best.offer(best.codes, quantiser.stored(refit(W, C, best.codes, best.p, quantiser)))
            best.offer(swept(best.p))
            if int((best.errors < before * (1 - SETTLED)).sum()) <= SETTLED * len(W):
                break
        return best.codes, best.p


class _Best:
    """The codes and parameters with the least error so far, row by row.

    Attributes:
        errors: (out,) squared error of every row under C, in float64.
    """

    def __init__(self, W: Tensor, C: Tensor, quantiser: Quantiser, codes: Tensor, p: Stored):
        self.W, self.C, self.quantiser, self.codes, self.p = W, C, quantiser, codes, p
        self.errors = self._errors(codes, p)

    def _errors(self, codes: Tensor, p: Stored) -> Float[Tensor, " out"]:
        D = (self.W - self.quantiser.decode(codes, p)).double()
        return ((D @ self.C) * D).sum(1)

    def offer(self, codes: Tensor, p: Stored | None = None) -> None:
        """Take these codes, and these parameters if they are new, for all rows that are better with them."""
        errors = self._errors(codes, p or self.p)
        better = errors < self.errors
        if p is not None and not self.quantiser.rowwise:
            better = (errors.sum() < self.errors.sum()).expand_as(better)
        if not bool(better.any()):
            return
        self.codes = torch.where(better[:, None], codes, self.codes)
        self.errors = torch.where(better, errors, self.errors)
        if p is not None:
            mixed = {k: torch.where(better[:, None, None], v, self.p.values[k]) for k, v in p.values.items()}
            self.p = p if bool(better.all()) else self.quantiser.stored(mixed)


def refit(
    W: Float[Tensor, "out in"], C: Float[Tensor, "in in"], codes: UInt8[Tensor, "out in"], p: Stored,
    quantiser: Quantiser, damping: float = 1e-10,
) -> GroupParameters:  # fmt: skip
    """argmin of (w - numbers) C (w - numbers)ᵀ over the floating point parameters of every row, for given codes.

    What the codes do not see of the parameters stays as it is.

    Args:
        damping: of the normal equations with unit diagonal.
    """
    design = quantiser.design(codes, p)
    widths = [d.shape[-1] for d in design.values()]
    A = torch.cat(list(design.values()), dim=-1).double()
    out, groups, g, k = A.shape
    filled = groups * g - W.shape[1]
    C = torch.nn.functional.pad(C.double(), (0, filled, 0, filled))
    E = torch.nn.functional.pad((W - quantiser.decode(codes, p)).double(), (0, filled)) @ C
    size = groups * k
    steps = []
    for rows in torch.arange(out, device=W.device).split(max(1, CHUNK // max(1, groups * g * k, size * size))):
        B = A[rows]
        M = B.new_zeros(len(rows), groups, k, groups, k)
        for j in range(groups):
            CB = (C[:, j * g : (j + 1) * g] @ B[:, j]).unflatten(1, (groups, g))
            M[:, :, :, j] = B.mT @ CB
        M = M.view(len(rows), size, size)
        wanted = (B.mT @ E[rows].view(len(rows), groups, g, 1)).view(len(rows), size)
        scale = M.diagonal(dim1=1, dim2=2).sqrt()
        scale = torch.where(scale > 0, 1 / torch.where(scale > 0, scale, 1.0), 0.0)
        M = M * scale[:, :, None] * scale[:, None, :]
        M.diagonal(dim1=1, dim2=2).copy_(torch.full_like(scale, 1 + damping))
        steps.append((scale * torch.linalg.solve(M, scale * wanted)).view(len(rows), groups, k))
    step = torch.cat(steps).split(widths, dim=-1) if steps else []
    return {**p.values, **{name: p.values[name] + d.to(W) for name, d in zip(design, step, strict=True)}}
