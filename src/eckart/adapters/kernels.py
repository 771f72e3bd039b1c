"""What adapters of convolutions have in common: low-rank kernels in three forms, and magnitude apart from direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, FactoredUpdate, Update
from eckart.adapters.frames import Factors
from eckart.adapters.host import Host, Site


@dataclass
class KernelAdapter(Adapter):
    """Settings of these adapters.

    Args:
        rank: of the update.
        alpha: the update is scaled by alpha / rank.
    """

    rank: int = 8
    alpha: float = 16.0

    def check(self) -> None:
        self.at_least(rank=self.rank)
        self.positive(alpha=self.alpha)


def sides_of(host: Host) -> list[int]:
    """(out, in), and the sides of the kernel that are more than 1; `in` is that of one group."""
    conv = host.conv
    return (
        [*host.shape]
        if conv is None
        else [host.out, conv.in_channels // conv.groups, *(n for n in conv.kernel_size if n > 1)]
    )


class Canonical(FactoredUpdate):
    """scale * sum over q of a[o, q] b[i, q] c[y, q] d[x, q], as convolutions from `in` to r channels, on each of these
    alone, and from r to `out`.

    Args:
        sides: of the kernel.
        rank: number of terms.
        scale: of the sum.
        site: draws the start: a is zero, the others have columns of length 1 on average.
    """

    def __init__(self, sides: list[int], rank: int, scale: float, site: Site):
        super().__init__()
        drawn = [site.normal(n, rank, std=n**-0.5) for n in sides[1:]]
        self.sides = nn.ParameterList([nn.Parameter(t) for t in (torch.zeros(sides[0], rank), *drawn)])
        self.scale = scale

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        left, right, *places = self.sides
        return self.scale * left, outer(right.T, places)

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        left, right, *places = self.sides
        if not places:
            return super().forward(x, y0, host)
        single = torch.ones(len(left.T), 1, dtype=x.dtype, device=x.device)
        kernel = outer(single, places).to(x.dtype)[:, None]
        h = host.slid(host.mix(x, right.T.to(x.dtype)), kernel, each=True)
        return host.up(h, self.scale * left.to(x.dtype))


def outer(rows: Float[Tensor, "r n"], sides: list[Float[Tensor, "size r"]]) -> Float[Tensor, "r entries"]:
    """Each row's outer product with its column of all sides."""
    for side in sides:
        rows = (rows[:, :, None] * side.T[:, None]).flatten(1)
    return rows


class Viewed(Update):
    """scale * B A of shape (out * height, in * width), read as a kernel in the order of its memory, as loralib does.

    Channels and places of the kernel mix, so it is no matrix of low rank of (out, in * height * width). A third
    side counts with the width, and a single one is the height.
    """

    def __init__(self, B: Float[Tensor, "outh rk"], A: Float[Tensor, "rk inw"], scale: float):
        super().__init__()
        self.B, self.A, self.scale = nn.Parameter(B), nn.Parameter(A), scale

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        return self.scale * (self.B @ self.A).view(host.shape)


def low_rank(site: Site, rank: int, scale: float, unfolding: str) -> Update:
    """LoRA of a kernel: of its rows (`channels`: LoRA-C), or of all its numbers as a square (`kernel`: ConvLoRA)."""
    conv, (out, in_) = site.host.conv, site.shape
    if conv is None or unfolding == "channels" or set(conv.kernel_size) == {1}:
        return Factors(torch.zeros(out, rank), site.uniform(rank, in_, bound=in_**-0.5), scale)
    first = conv.kernel_size[0]
    rows, columns = rank * max(conv.kernel_size), in_ // first
    return Viewed(torch.zeros(out * first, rows), site.uniform(rows, columns, bound=columns**-0.5), scale)


class Decomposed(Update):
    """W' = m V / ||V|| by output channel, of V = W + the update inside; m starts at ||W||, where W' is W.

    The norm is a constant for the gradient (Liu et al., DoRA, ICML 2024, arXiv 2402.09353, section 4.3).
    """

    def __init__(self, inner: Update, host: Host):
        super().__init__()
        self.inner = inner
        self.magnitude = nn.Parameter(lengths(host.weight()))

    def gain(self, host: Host) -> Float[Tensor, " out"]:
        """m / ||V||."""
        with torch.no_grad():
            norm = lengths(host.weight() + self.inner.delta(host).float())
        return self.magnitude / norm.clamp(min=torch.finfo(norm.dtype).tiny).to(self.magnitude.dtype)

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        W = host.weight().to(self.magnitude.dtype)
        return self.gain(host)[:, None] * (W + self.inner.delta(host)) - W

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        gain = host.along(self.gain(host).to(x.dtype))
        return (gain - 1) * host.unbiased(y0.to(x.dtype)) + gain * self.inner(x, y0, host)


def lengths(W: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """Of the rows."""
    return torch.linalg.vector_norm(W, dim=1)
