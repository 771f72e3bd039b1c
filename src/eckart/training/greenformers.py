"""Greenformers' automatic factorisation: every linear layer and convolution as an encoder and a decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.forms import Dense, LowRank
from eckart.forms.algebra import ProductMatrix
from eckart.forms.layers import kind_of, matrix_shape
from eckart.forms.low_rank import balance
from eckart.jobs.recipe import Recipe
from eckart.linalg.nonnegative import nmf, semi_nmf
from eckart.registry import method
from eckart.training.base import Born, dtype_of, like
from eckart.training.chains import ConvChain, WithConvolutions, drawn, gain_of

SOLVERS = ("svd", "random", "nmf", "snmf")


@method("greenformers", family="low-rank", paper="Greenformers: Improving Computation and Memory Efficiency in Transformer Models via Low-Rank Approximation, Cahyawijaya, 2021, arXiv 2108.10808")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class Greenformers(Born):
    """LED and CED: in -> r -> out in every linear layer, and in every convolution a kernel to r channels, then one tap.

    Before training (`solver="random"`, the low-rank transformer of Winata et al., ICASSP 2020) or from trained weights.
    A layer whose rank would be 0, or not below break-even, stays as it is and is told. Departures: random factors are
    only had by asking for them, as they throw away the weight, and make outputs as large as it does; both factors of an
    SVD share its values evenly; a grouped convolution keeps its groups in both, each of rank r / groups. The thesis'
    other half, attention that projects the sequence (Linformer), is no structure of a weight: it is
    `eckart.training.use_linformer`, which goes together with this.

    Args:
        rank: r; a whole number from 1 on is the rank itself, a share below 1 that of the break-even rank, the lower
            whole number. Groups of a convolution round it up.
        solver: `svd`; `random`; `nmf`, where no weight is negative; `snmf`, whose decoder is not negative.
        iterations: of the solvers of non-negative factors.
        break_even: of kernels, the `exact` out in K / (in K + out), K their taps, or the `library`'s
            out in / (in + out), which stops earlier.
    """

    rank: float = 0.25
    solver: Literal["svd", "random", "nmf", "snmf"] = "svd"
    iterations: int = 10
    break_even: Literal["exact", "library"] = "exact"
    taken: ClassVar[type[Recipe]] = WithConvolutions

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) or self.rank.is_integer()
        if isinstance(self.rank, bool) or not self.rank > 0 or (self.rank > 1 and not whole):
            raise ValueError(f"greenformers(rank={self.rank!r}): it is a whole number, or a share of break-even below 1")  # fmt: skip # noqa: E501
        if self.solver not in SOLVERS:
            raise ValueError(f"greenformers(solver={self.solver!r}): it is one of {', '.join(SOLVERS)}")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"greenformers(iterations={self.iterations!r}): it is a positive integer")
        if self.break_even not in ("exact", "library"):
            raise ValueError(f"greenformers(break_even={self.break_even!r}): it is 'exact' or 'library'")

    def most(self, module: nn.Module) -> int:
        """The break-even rank of a layer."""
        conv: Any = module
        if hasattr(module, "kernel_size"):
            out, in_, taps = conv.out_channels, conv.in_channels, math.prod(conv.kernel_size)
        else:
            (out, in_), taps = matrix_shape(module), 1
        taps = taps if self.break_even == "exact" else 1
        return int(out * in_ * taps // max(1, in_ * taps + out))

    def rank_of(self, module: nn.Module) -> int | None:
        """The rank of a layer; None where it stays as it is."""
        most, groups = self.most(module), int(getattr(module, "groups", 1))
        rank = int(self.rank) if self.rank >= 1 else int(self.rank * most)
        rank = -(-rank // groups) * groups
        return rank if 0 < rank < most else None

    def factors(
        self, W: Float[Tensor, "out in"], rank: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        """Decoder and encoder of one matrix. Raises `ValueError` where the solver cannot take it."""
        out, in_ = W.shape
        if self.solver == "svd":
            decoder, encoder = LowRank(rank).fit(W).parameters()
            return decoder.detach(), encoder.detach()
        if self.solver == "random":
            encoder_, decoder_ = drawn([((rank, in_), in_), ((out, rank), rank)], gain_of(W), generator)
            return decoder_.to(W), encoder_.to(W)
        solve = nmf if self.solver == "nmf" else semi_nmf
        X, Y, _ = solve(W, rank, iterations=self.iterations, generator=generator)
        return balance(X, Y)

    def stand_in(self, module: nn.Module, W: Float[Tensor, "out in"], generator: torch.Generator) -> nn.Module:
        rank, dtype, conv = self.rank_of(module), dtype_of(module), kind_of(module) is None
        if rank is None:
            return module
        groups: int = module.groups if conv else 1  # type: ignore[assignment]
        pairs = [self.factors(part, rank // groups, generator) for part in W.flatten(1).chunk(groups)]
        decoder, encoder = (torch.cat(side) for side in zip(*pairs, strict=True))
        if conv:
            bias: Any = module.bias
            chain = ConvChain(module, "encoder_decoder", rank, bias=bias is not None, dtype=dtype)
            return chain.fill([encoder, decoder], bias)
        left, right = Dense().fit(decoder, dtype=dtype), Dense().fit(encoder, dtype=dtype)
        return like(module, ProductMatrix(left, right, LowRank(rank)))
