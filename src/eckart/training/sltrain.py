"""SLTrain: low-rank factors plus a sparse matrix on a random support that never changes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.forms import LowRank, Sparse
from eckart.forms.algebra import SumMatrix
from eckart.forms.scaled import Scaled
from eckart.registry import method
from eckart.training.base import Born, dtype_of, like


@method("sltrain", family="sparse + low-rank", paper="SLTrain, Han et al., NeurIPS 2024, arXiv 2406.02214")
@dataclass(frozen=True)
class SLTrain(Born):
    """W = (alpha / r) B A + S from the first step, S on a random support: rank for little memory.

    Between forward and backward no matrix of the weight's size is kept. The low-rank term is not merged with S before
    the product with x, as it is in the paper: the result is the same, and x Aᵀ (tokens, rank) is kept instead of
    forming B A twice. A bias starts as the model's own.

    Args:
        rank: r, of A (r, in) and B (out, r).
        density: share of entries of S; the lower whole number of entries is kept.
        alpha: scale of the low-rank term, over the rank.
        start: `scratch` draws A as Kaiming does, B = 0 and S uniform within 1 / sqrt(in), and forgets the weight that
            is there; `weight` fits low-rank plus its largest remaining entries to it.
    """

    rank: int = 128
    density: float = 0.03
    alpha: float = 32.0
    start: Literal["scratch", "weight"] = "scratch"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"sltrain(rank={self.rank!r}): the rank is a positive integer")
        if not 0 < self.density < 1:
            raise ValueError(f"sltrain(density={self.density!r}): the density is a share between 0 and 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"sltrain(alpha={self.alpha!r}): the scale is a positive number")
        if self.start not in ("scratch", "weight"):
            raise ValueError(f"sltrain(start={self.start!r}): it is 'scratch' or 'weight'")

    def stand_in(self, module: nn.Module, W: Float[Tensor, "out in"], generator: torch.Generator) -> nn.Module:
        out, in_ = W.shape
        count, dtype = int(self.density * W.numel()), dtype_of(module)
        if count == 0:
            raise ValueError(f"a density of {self.density} leaves no entry of a matrix of shape {(out, in_)}: raise it")
        low, sparse = Scaled(LowRank(self.rank), self.alpha / self.rank), Sparse(count / W.numel())
        if self.start == "weight":
            return like(module, (low + sparse).fit(W, dtype=dtype))
        bound = 1 / math.sqrt(in_)
        factors = low.build((out, in_), dtype=dtype, device=str(W.device))
        B, A = factors.parameters()
        nn.init.zeros_(B)
        A.data.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
        support = torch.zeros(W.numel(), dtype=torch.bool)
        support[torch.randperm(W.numel(), generator=generator)[:count]] = True
        values = torch.empty(out, in_).uniform_(-bound, bound, generator=generator)
        entries = sparse.holding(support.view(out, in_).to(W.device), values.to(W.device), dtype)
        return like(module, SumMatrix([factors, entries], low + sparse))
