"""Convolutions that are compressed before they are trained: one-way filters in a separable format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.jobs.recipe import Recipe
from eckart.linalg.canonical import cp_als
from eckart.registry import method
from eckart.training.base import Born, dtype_of
from eckart.training.chains import ConvChain, OnlyKernels, drawn, gain_of
from eckart.training.separable import by_sides, separated

FORMATS = ("cp", "separable", "depth_separable")


@method("apriori_conv", family="convolution", paper="A priori compression of convolutional neural networks for wave simulators, Boukraichi et al., 2023, arXiv 2304.04964")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class AprioriConv(Born):
    """A kernel (out, in, h, w) as filters along one axis each, from the first step on; the kernel is never formed.

    `cp`: K[o, c, y, x] = sum_r A[o, r] B[c, r] P[y, r] Q[x, r], as a mixing of channels, a depthwise filter along every
    axis and a mixing again. The exact arrangement in the paper is not published; this is the natural reading. Layers
    without taps, and linear ones, are left alone. Factors have no fixed scale, so that weight decay on them is not
    decay of K. Depthwise filters are bound by memory: fewer multiplications need not be faster.

    Args:
        scheme: `cp`; `separable`, a filter along every axis that mixes channels, in three ways for fields of three
            dimensions; `depth_separable`, a depthwise filter along every axis and one mixing.
        rank: channels within; whole numbers are these, a share up to 1.0 is that of min(in, out). A depth-separable
            layer has those that come in.
        start: `draw` forgets the weight but for its size, so that outputs are as large; `weight` fits it, by
            alternating least squares, or an SVD where there are two filters.
    """

    scheme: Literal["cp", "separable", "depth_separable"] = "cp"
    rank: float = 1.0
    start: Literal["draw", "weight"] = "draw"
    taken: ClassVar[type[Recipe]] = OnlyKernels

    def __post_init__(self) -> None:
        for name, known in (("scheme", FORMATS), ("start", ("draw", "weight"))):
            if getattr(self, name) not in known:
                raise ValueError(f"apriori_conv({name}={getattr(self, name)!r}): it is one of {', '.join(known)}")
        if not (self.rank >= 1 if isinstance(self.rank, int) else 0 < self.rank <= 1):
            raise ValueError(f"apriori_conv(rank={self.rank!r}): it is a whole number from 1 on, or a share above 0 up to 1.0")  # fmt: skip # noqa: E501

    def rank_of(self, conv: Any) -> int:
        """Channels within one layer."""
        if self.scheme == "depth_separable":
            return int(conv.in_channels)
        if isinstance(self.rank, int):
            return self.rank
        share = max(1, round(self.rank * min(conv.in_channels, conv.out_channels)))
        return int(-(-share // conv.groups) * conv.groups)

    def stand_in(self, module: nn.Module, W: Float[Tensor, "out in"], generator: torch.Generator) -> nn.Module:
        conv: Any = module
        rank, K = self.rank_of(conv), W.view(conv.weight.shape)
        chain = ConvChain(conv, self.scheme, rank, bias=conv.bias is not None, dtype=dtype_of(module))
        if self.start == "draw":
            shapes = [(c.weight.shape, c.weight[0].numel()) for c in chain.convolutions]
            return chain.fill([k.to(W) for k in drawn(shapes, gain_of(W.flatten(1)), generator)], conv.bias)
        if conv.groups > 1:
            raise ValueError("a kernel in groups is not fitted: set start='draw'")
        if self.scheme == "separable":
            if K.dim() != 4:
                raise ValueError("only kernels of two dimensions are separated by an SVD: set start='draw' or scheme='cp'")  # fmt: skip # noqa: E501
            return separated(conv, by_sides(K), rank)
        return chain.fill(fitted(K, rank, self.scheme, generator), conv.bias)


def fitted(K: Float[Tensor, "out in *taps"], rank: int, scheme: str, generator: torch.Generator) -> list[Tensor]:
    """Kernels of a `cp` or a `depth_separable` chain for this one, in the order of the chain."""
    if scheme == "cp":
        (A, B, *along), _ = cp_als(K, rank, generator=generator)
        return [B.T, *(P.T for P in along), A]
    channels = [cp_als(k, 1, generator=generator)[0] for k in K.unbind(1)]
    A, *along = (torch.cat(side, 1) for side in zip(*channels, strict=True))
    return [*(P.T for P in along), A]
