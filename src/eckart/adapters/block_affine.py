"""Bone as its author first trained it: blocks of the weight change, by one matrix for each column of blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, Update
from eckart.adapters.host import Host, Site
from eckart.adapters.tuner import adapter


class BlockAffine(Update):
    """W_ij b_j + b_j for each block of size r; `b` (in / r, r, r)."""

    def __init__(self, in_: int, rank: int):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(in_ // rank, rank, rank))

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        blocks, r, _ = self.b.shape
        W = host.weight().view(host.out // r, r, blocks, r)
        changed = torch.einsum("iajk,jkl->iajl", W, self.b) + self.b.transpose(0, 1)
        return changed.reshape(host.shape)

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        """The frozen layer on what the matrices make of x, plus their sum: the change itself is never formed."""
        blocks, r, _ = self.b.shape
        z = torch.einsum("...jl,jkl->...jk", x.unflatten(-1, (blocks, r)), self.b)
        shared = z.sum(-2).repeat(*[1] * (x.dim() - 1), host.out // r)
        return host.frozen(z.flatten(-2)) + shared


@adapter("block_affine", family="shared blocks", paper="Bone, Kang, 2024, arXiv 2409.15371v1, author's training code")
@dataclass
class BlockAffineTuning(Adapter):
    """Each r x r block W_ij becomes W_ij (I + b_j) + b_j: one trained matrix for every column of blocks, zero at first.

    The form of the abstract, grouped as in the author's training code; `bone(mode="bat")` is PEFT's, which has a matrix
    for every row of blocks. No scale, rank * in trained numbers, and a second pass through the frozen layer.

    Args:
        rank: r, which divides both sides of the matrix.
    """

    rank: int = 32

    def check(self) -> None:
        self.at_least(rank=self.rank)

    def update(self, site: Site) -> BlockAffine:
        out, in_ = site.shape
        if site.host.conv is not None:
            raise ValueError(f"{site.name} is a convolution, whose inputs have no blocks: leave it out with exclude_modules")  # fmt: skip # noqa: E501
        if out % self.rank or in_ % self.rank:
            raise ValueError(f"{site.name}: a matrix of shape {site.shape} cannot be cut into blocks of {self.rank} x {self.rank}: choose a rank that divides both, or leave the layer out")  # fmt: skip # noqa: E501
        return BlockAffine(in_, self.rank)
