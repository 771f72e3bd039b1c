"""How a server joins what clients upload, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from eckart.adapters.federation.factors import Pair, compacted, gaussian_rows, turned
from eckart.adapters.host import seeded


class Rule:
    """What becomes of one layer after a round; the mean of each factor, if not overridden.

    Attributes:
        trains_A: whether clients train A, too; None where both will do.
    """

    trains_A: ClassVar[bool | None] = None

    def joined(self, now: Pair, uploads: Sequence[Pair], shares: Sequence[float], number: int, name: str) -> Pair:
        """The layer's new tensors.

        Args:
            now: what clients started from.
            uploads: what they came to.
            shares: the weight of each, which add up to 1.
            number: of the round, from 1.
            name: of the layer.
        """
        return now._replace(B=mean([u.B for u in uploads], shares), A=mean([u.A for u in uploads], shares))


class Exact(Rule):
    """The mean product: its best rank r is trained on, and the rest kept, so that nothing is lost."""

    trains_A = True

    def joined(self, now: Pair, uploads: Sequence[Pair], shares: Sequence[float], number: int, name: str) -> Pair:
        left, right = stacked(uploads, shares)
        B, A, rest_B, rest_A = turned(left, right, len(now.A), name)
        return kept(Pair(B, A, now.kept_B, now.kept_A), rest_B, rest_A, name)


class Stack(Rule):
    """All factors side by side are the mean product, which is kept; training begins anew at B = 0 with a new A."""

    trains_A = True

    def joined(self, now: Pair, uploads: Sequence[Pair], shares: Sequence[float], number: int, name: str) -> Pair:
        A = gaussian_rows(len(now.A), now.A.shape[1], seeded(number, name)).to(now.A)
        return kept(Pair(torch.zeros_like(now.B), A, now.kept_B, now.kept_A), *stacked(uploads, shares), name)


class Residual(Rule):
    """The mean of each factor, and kept: what the mean product differs by from the product of means."""

    trains_A = True

    def joined(self, now: Pair, uploads: Sequence[Pair], shares: Sequence[float], number: int, name: str) -> Pair:
        new = super().joined(now, uploads, shares, number, name)
        left, right = stacked(uploads, shares)
        return kept(new, torch.cat([left, -new.B], 1), torch.cat([right, new.A]), name)


class Refresh(Rule):
    """The mean of B, and after every `period` rounds the SVD of B A: A becomes its right singular vectors.

    Args:
        period: 0 refreshes never.
        warmup: rounds without a refresh.
    """

    trains_A = False

    def __init__(self, period: int = 1, warmup: int = 0):
        self.period, self.warmup = period, warmup

    def joined(self, now: Pair, uploads: Sequence[Pair], shares: Sequence[float], number: int, name: str) -> Pair:
        B = mean([u.B for u in uploads], shares)
        if self.period == 0 or number <= self.warmup or (number - self.warmup) % self.period:
            return now._replace(B=B)
        B, A, *_ = turned(B, now.A, len(now.A), name)
        return now._replace(B=B, A=A)


RULES: dict[str, type[Rule]] = {"mean": Rule, "exact": Exact, "stack": Stack, "residual": Residual}
"""Those of LoRAs of which both factors are trained."""


def mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """sum_k p_k T_k, added up in float64: of equal tensors it is that tensor, to the bit."""
    total = sum(p * t.double() for p, t in zip(shares, tensors, strict=True))
    assert isinstance(total, Tensor)
    return total.to(tensors[0].dtype)


def stacked(uploads: Sequence[Pair], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Two factors whose product is sum_k p_k B_k A_k."""
    return torch.cat([p * u.B for p, u in zip(shares, uploads, strict=True)], 1), torch.cat([u.A for u in uploads])


def kept(pair: Pair, B: Tensor, A: Tensor, name: str) -> Pair:
    """The pair with one more product kept."""
    left, right = compacted(torch.cat([pair.kept_B, B], 1), torch.cat([pair.kept_A, A]), name)
    return pair._replace(kept_B=left, kept_A=right)
