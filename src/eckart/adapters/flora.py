"""FLoRA: a weight's update as a small core tensor with one factor for each of the weight's sides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, FactoredUpdate
from eckart.adapters.host import Host, Site
from eckart.adapters.kernels import sides_of
from eckart.adapters.tuner import adapter


class Tucker(FactoredUpdate):
    """scale * G x_1 U_1 x_2 U_2 ..., as convolutions from `in` to r_in, with the core to r_out, and to `out` channels.

    Args:
        factors: U_k (d_k, r_k), of out, in, height, width.
        scale: of the update.
    """

    def __init__(self, factors: list[Float[Tensor, "side rank"]], scale: float):
        super().__init__()
        self.U = nn.ParameterList([nn.Parameter(U) for U in factors])
        self.core = nn.Parameter(torch.zeros([U.shape[1] for U in factors]))
        self.scale = scale

    def kernel(self) -> Float[Tensor, "r_out r_in *places"]:
        """The core with the factors of the places."""
        kernel: Tensor = self.core
        for k, U in enumerate(self.U):
            if k > 1:
                kernel = torch.tensordot(kernel, U, dims=([2], [1]))
        return kernel

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        right = torch.tensordot(self.kernel(), self.U[1], dims=([1], [1]))
        return self.scale * self.U[0], right.movedim(-1, 1).flatten(1)

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        h = host.slid(host.mix(x, self.U[1].T.to(x.dtype)), self.kernel().to(x.dtype))
        return host.up(h, self.scale * self.U[0].to(x.dtype))


@adapter("flora", family="convolutions", paper="FLoRA, Si et al., ICLR 2025, arXiv 2405.14739")
@dataclass
class FLoRA(Adapter):
    """W + s G x_1 U_out x_2 U_in x_3 U_height x_4 U_width; on linear layers W + s U_out G U_inᵀ.

    Kernels have one to three sides, of which those that are 1 have no factor; `in` is that of one group.

    Args:
        rank: of out and in.
        kernel_rank: of height and width.
        ranks: instead, one for each side (out, in, height, width) of every layer.
        scale: s on linear layers.
        conv_scale: s on convolutions, where the paper's is ten times as large.
    """

    rank: int = 8
    kernel_rank: int = 2
    ranks: list[int] | None = None
    scale: float = 0.4
    conv_scale: float = 4.0

    def check(self) -> None:
        self.at_least(rank=self.rank, kernel_rank=self.kernel_rank)
        self.positive(scale=self.scale, conv_scale=self.conv_scale)
        if self.ranks is not None:
            self.at_least(**{f"ranks[{k}]": r for k, r in enumerate(self.ranks)})

    def update(self, site: Site) -> Tucker:
        sides = sides_of(site.host)
        ranks = self.ranks or [site.rank, site.rank, *(self.kernel_rank for _ in sides[2:])]
        if len(ranks) != len(sides):
            raise ValueError(f"{site.name}: ranks={ranks} are {len(ranks)}, but its weight has the sides {sides}: give one for each, or target other layers")  # fmt: skip # noqa: E501
        for side, rank in zip(sides, ranks, strict=True):
            if rank > side:
                raise ValueError(f"{site.name}: rank {rank} is more than a side of {side} can have: its weight has the sides {sides}; lower it, give one for each side, ranks=[...], or leave the layer out")  # fmt: skip # noqa: E501
        drawn = [site.normal(d, r, std=math.sqrt(0.5 / r)) for d, r in zip(sides, ranks, strict=True)]
        return Tucker(drawn, self.scale if site.host.conv is None else self.conv_scale)
