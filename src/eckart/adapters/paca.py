"""PaCA: some columns of the weight are trained, and only their inputs are kept for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.adapters.base import Adapter, Update
from eckart.adapters.host import Host, Site
from eckart.adapters.tuner import adapter

SELECTIONS = ("random", "largest", "smallest")


class Columns(Update):
    """scale * change Eᵀ, E the columns of the identity that were selected.

    For backward it saves the selected inputs (tokens, r), and nothing of the size of the input.

    Args:
        indices: of the r trained input features; of a convolution, input channels.
        out: rows of the matrix.
        taps: columns of the matrix that one feature has: 1, or the size of the convolution's window.
        scale: of the change.
    """

    indices: Tensor

    def __init__(self, indices: Int[Tensor, " r"], out: int, taps: int, scale: float):
        super().__init__()
        self.register_buffer("indices", indices)
        self.change = nn.Parameter(torch.zeros(out, len(indices) * taps))
        self.taps, self.scale = taps, scale

    @property
    def columns(self) -> Int[Tensor, " c"]:
        """Of the matrix, which are trained."""
        own = torch.arange(self.taps, device=self.indices.device)
        return (self.indices[:, None] * self.taps + own).flatten()

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        return self.change.new_zeros(host.shape).index_copy(1, self.columns, self.scale * self.change)

    def factors(self, host: Host) -> tuple[Float[Tensor, "out c"], Float[Tensor, "c in"]]:
        picked = F.one_hot(self.columns, host.width).to(self.change.dtype)
        return self.scale * self.change, picked

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        if host.conv is None:
            return F.linear(self.scale * x.index_select(-1, self.indices), self.change.to(x.dtype))
        kernel = self.change.to(x.dtype).view(len(self.change), len(self.indices), -1)
        return host.slid(self.scale * x.index_select(host.channels, self.indices), kernel)


@adapter("paca", family="partial weights", paper="PaCA, Woo et al., ICLR 2025, arXiv 2503.01905")
@dataclass
class PaCA(Adapter):
    """W[:, I] + (alpha / rank) C: r columns of the weight are trained, those of some of the input features.

    The paper trains P = W[:, I] / c with c = alpha / rank in the weight itself; here C = P - P_0 is trained beside it,
    which is the same for an optimiser without weight decay, leaves the frozen weight alone, and costs one thin product
    more, half of LoRA's. With weight decay the columns are drawn to their start, not to zero. On a weight that
    `eckart.compress` quantised it is QPaCA. As a LoRA its A is frozen and picks features. Which ones is saved.

    Args:
        rank: r, trained input features of each layer; of a convolution, input channels.
        alpha: over rank, it multiplies the learning rate.
        selection: of the features: `random`, or those whose columns have the `largest` or `smallest` norm.
    """

    rank: int = 16
    alpha: float = 64.0
    selection: str = "random"

    def check(self) -> None:
        self.at_least(rank=self.rank)
        self.positive(alpha=self.alpha)
        if self.selection not in SELECTIONS:
            raise ValueError(f"paca(selection={self.selection!r}): it is one of {', '.join(SELECTIONS)}")

    def update(self, site: Site) -> Columns:
        out, in_ = site.shape
        conv = site.host.conv
        if site.host.groups > 1:
            raise ValueError(f"{site.name} is a grouped convolution, of which no column belongs to one input channel, as paca's do: leave it out with exclude_modules, or take lora_c or lift, which sit there, too")  # fmt: skip # noqa: E501
        features = in_ if conv is None else conv.in_channels
        if site.rank > features:
            raise ValueError(f"{site.name}: paca(rank={site.rank}) trains more input features than the {features} that it has: lower the rank or leave the layer out")  # fmt: skip # noqa: E501
        if self.selection == "random":
            indices = torch.randperm(features, generator=site.generator)[: site.rank]
        else:
            norms = site.host.weight().view(out, features, -1).norm(dim=(0, 2))
            indices = norms.topk(site.rank, largest=self.selection == "largest").indices
        return Columns(indices.sort().values.cpu(), out, in_ // features, self.alpha / site.rank)
