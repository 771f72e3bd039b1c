"""Hydra: a low-rank branch beside the frozen layer, and one behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, Update
from eckart.adapters.host import Host, Site
from eckart.adapters.tuner import adapter


class Branch(nn.Module):
    """h -> B (A h + a) + b, which starts at zero.

    Args:
        A: (r, channels of h).
        out: rows of B.
        biases: whether there are a and b.
    """

    a: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(self, A: Float[Tensor, "r channels"], out: int, biases: bool):
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(torch.zeros(out, len(A)))
        self.register_parameter("a", nn.Parameter(torch.zeros(len(A))) if biases else None)
        self.register_parameter("b", nn.Parameter(torch.zeros(out)) if biases else None)

    def up(self, h: Tensor, host: Host) -> Tensor:
        """B (h + a) + b of h = A x."""
        y = host.up(h, self.B.to(h.dtype))
        return y if self.b is None else host.shift(y, self.constant().to(y.dtype))

    def constant(self) -> Float[Tensor, " out"]:
        """What the branch adds to everything."""
        return torch.zeros_like(self.B[:, 0]) if self.a is None or self.b is None else self.B @ self.a + self.b


class TwoBranches(Update):
    """scale (P(x) + S(y0)): P has rank r, S has rank s and sees the frozen output with its bias."""

    def __init__(self, parallel: Branch | None, sequential: Branch | None, scale: float):
        super().__init__()
        self.parallel, self.sequential, self.scale = parallel, sequential, scale

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r_s"], Float[Tensor, "r_s in"]]:
        left: list[Tensor] = []
        right: list[Tensor] = []
        if self.parallel is not None:
            left.append(self.parallel.B)
            right.append(self.parallel.A)
        if self.sequential is not None:
            left.append(self.sequential.B)
            right.append(self.sequential.A @ host.weight().to(self.dtype))
        return self.scale * torch.cat(left, 1), torch.cat(right)

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        left, right = self.factors(host)
        return left @ right

    def bias_delta(self, host: Host) -> Float[Tensor, " out"] | None:
        branches = [b for b in (self.parallel, self.sequential) if b is not None]
        total, bias = torch.stack([b.constant() for b in branches]).sum(0), host.bias()
        if self.sequential is not None and bias is not None:
            total = total + self.sequential.B @ (self.sequential.A @ bias.to(self.dtype))
        elif all(b.a is None for b in branches):
            return None
        return self.scale * total

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        if self.parallel is not None:
            total = total + self.parallel.up(host.down(x, self.parallel.A.to(x.dtype)), host)
        if self.sequential is not None:
            seen = F.dropout(y0.to(x.dtype), self.dropout, self.training and self.dropout > 0)
            total = total + self.sequential.up(host.mix(seen, self.sequential.A.to(x.dtype)), host)
        return self.scale * total


@adapter("hydra", family="transforms", paper="Hydra, Kim et al., 2023, arXiv 2309.06922")
@dataclass
class Hydra(Adapter):
    """(I + s B_s A_s) W + s B_p A_p: features recombined by a branch behind the layer, new ones from one beside it.

    Both branches are linear, so they merge; the bias b becomes (I + s B_s A_s) b. The paper puts them on the second
    layer of every feed-forward block. Dropout acts on what each branch sees.

    Args:
        rank: of the parallel branch, 0 for none.
        sequential_rank: of the one behind the layer, 0 for none.
        scale: s, of both.
        biases: whether all four projections have biases, as in the paper's vision models.
    """

    rank: int = 4
    sequential_rank: int = 8
    scale: float = 1.0
    biases: bool = False

    def check(self) -> None:
        ranks = {"rank": self.rank, "sequential_rank": self.sequential_rank}
        for name, value in ranks.items():
            if value != 0:
                self.at_least(**{name: value})
        if not any(ranks.values()):
            raise ValueError("hydra(rank=0, sequential_rank=0) has no branch at all: give one of them a rank")
        self.positive(scale=self.scale)

    def update(self, site: Site) -> TwoBranches:
        out, in_ = site.shape
        rank, behind = self.fitting(site), self.sequential_rank
        if behind > out:
            raise ValueError(f"{site.name}: sequential_rank {behind} is more than its {out} outputs can have: lower it")
        if behind and site.host.groups > 1:
            raise ValueError(f"{site.name} is a grouped convolution, whose groups a branch behind it would mix: set sequential_rank=0, which leaves the branch beside it, or leave the layer out")  # fmt: skip # noqa: E501
        branches = [
            Branch(site.uniform(r, width, bound=width**-0.5), out, self.biases) if r else None
            for r, width in ((rank, in_), (behind, out))
        ]
        return TwoBranches(branches[0], branches[1], self.scale)
