"""Block-LoRA: LoRA cut into blocks along the rank, which share one down-projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, FactoredUpdate
from eckart.adapters.host import Host, Site
from eckart.adapters.tuner import adapter


class Blocks(FactoredUpdate):
    """scale * (B_1 + ... + B_n) A.

    Args:
        B: (blocks, out, s).
        A: (s, in).
        scale: of the product.
        block_dropout: of A x, in training, for each block anew.
    """

    def __init__(self, B: Float[Tensor, "n out s"], A: Float[Tensor, "s in"], scale: float, block_dropout: float):
        super().__init__()
        self.B, self.A, self.scale, self.block_dropout = nn.Parameter(B), nn.Parameter(A), scale, block_dropout

    def factors(self, host: Host) -> tuple[Float[Tensor, "out s"], Float[Tensor, "s in"]]:
        return self.scale * self.B.sum(0), self.A

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        if not (self.training and self.block_dropout):
            return super().forward(x, y0, host)
        h = host.down(x, self.A.to(x.dtype))
        each = [host.up(F.dropout(h, self.block_dropout), B.to(x.dtype)) for B in self.B]
        return self.scale * torch.stack(each).sum(0)


@adapter("block_lora", family="low rank", paper="Block-LoRA, Zhou et al., 2025, arXiv 2501.16720")
@dataclass
class BlockLoRA(Adapter):
    """W + c (B_1 + ... + B_n) A_0: of n blocks of rank / n, all have the same A_0.

    What it can reach is exactly LoRA of rank / n. With blocks that start at zero and an optimiser that treats numbers
    one by one (SGD, Adam), all blocks get the same gradient and stay equal: it is then LoRA of rank / n whose B learns
    n times as fast. Blocks that start apart, or a dropout of their own, make it differ from that.

    Args:
        rank: nominal; rank / blocks is what the update has.
        blocks: n.
        alpha: c = alpha / sqrt(rank / blocks).
        scale: c itself, in its place; 0 takes alpha.
        start: of the blocks: `zero`, or `balanced`, which draws them so that their sum is zero.
        block_dropout: of the down-projected input, for each block anew.
    """

    rank: int = 8
    blocks: int = 4
    alpha: float = 1.0
    scale: float = 0.0
    start: str = "zero"
    block_dropout: float = 0.0

    def check(self) -> None:
        self.at_least(rank=self.rank, blocks=self.blocks)
        self.positive(alpha=self.alpha)
        self.not_negative(scale=self.scale)
        if self.start not in ("zero", "balanced"):
            raise ValueError(f"block_lora(start={self.start!r}): it is 'zero' or 'balanced'")
        if self.start == "balanced" and self.blocks == 1:
            raise ValueError("block_lora(start='balanced', blocks=1): one block alone can only be zero; take start='zero' or more blocks")  # fmt: skip # noqa: E501
        if not 0 <= self.block_dropout < 1:
            raise ValueError(f"block_lora(block_dropout={self.block_dropout!r}): it is a share from 0, below 1")

    def update(self, site: Site) -> Blocks:
        rank, (out, in_) = self.fitting(site), site.shape
        if rank % self.blocks:
            raise ValueError(f"{site.name}: block_lora cannot cut rank {rank} into {self.blocks} equal blocks: take a rank that {self.blocks} divides")  # fmt: skip # noqa: E501
        size = rank // self.blocks
        A = site.uniform(size, in_, bound=in_**-0.5)
        B = torch.zeros(self.blocks, out, size)
        if self.start == "balanced":
            drawn = site.uniform(self.blocks // 2, out, size, bound=size**-0.5)
            B[0 : 2 * len(drawn) : 2], B[1 : 2 * len(drawn) : 2] = drawn, -drawn  # pairs: their sum is zero to the bit
        return Blocks(B, A, self.scale or self.alpha * size**-0.5, self.block_dropout)
