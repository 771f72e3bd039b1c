"""A sum of rank-one components that become active one after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import FactoredUpdate
from eckart.adapters.host import Host, Site

READY = 1e-5
"""The value of a component that waits for its turn: small enough to change nothing, and its vectors get gradients."""


class Growing(FactoredUpdate):
    """alpha / rank * sum of e_i b_i a_i over the active components, and over those that wait for their turn.

    All components that there may be are made at the start, each of three parameters `A[i]` (1, in), `B[i]` (out, 1) and
    `E[i]` (1,). One that is not in use gets no gradient, so that optimisers leave it alone and keep no state of it.

    Args:
        site: where it sits.
        active: components in use from the start.
        most: components that there may be.
        reserve: that wait for their turn with a fixed value, while their vectors learn.
        alpha: of the scale alpha / rank.
        advance: whether components wait for their turn, learning.
    """

    counts: Tensor
    born: Tensor
    scores: Tensor

    def __init__(self, site: Site, active: int, most: int, reserve: int, alpha: float, advance: bool):
        super().__init__()
        out, in_ = site.shape
        self.A = nn.ParameterList([nn.Parameter(site.normal(1, in_, std=0.02)) for _ in range(most)])
        self.B = nn.ParameterList([nn.Parameter(site.normal(out, 1, std=0.02)) for _ in range(most)])
        later = READY if advance else 0.0
        self.E = nn.ParameterList([nn.Parameter(torch.full((1,), 0.0 if i < active else later)) for i in range(most)])
        self.alpha = alpha
        self.register_buffer("counts", torch.tensor([active, reserve]))
        self.register_buffer("born", torch.zeros(2, most, dtype=torch.int64))
        self.register_buffer("scores", torch.zeros(2))
        self._counted: tuple[int, int] | None = None
        self.watched = False
        self.sensitivity: Tensor | None = None

    def _load_from_state_dict(self, *given: Any) -> None:
        self._counted = None
        super()._load_from_state_dict(*given)

    @property
    def dtype(self) -> torch.dtype:
        return self.A[0].dtype

    @property
    def most(self) -> int:
        return len(self.E)

    @property
    def rank(self) -> int:
        """Active components."""
        return self.counted[0]

    @property
    def counted(self) -> tuple[int, int]:
        """How many components are active, and how many wait for their turn."""
        if self._counted is None:
            active, reserve = self.counts.tolist()
            self._counted = active, reserve
        return self._counted

    def _count(self, active: int, reserve: int) -> None:
        self.counts.copy_(torch.tensor([active, reserve]))
        self._counted = active, reserve

    def parts(self, which: str) -> list[nn.Parameter]:
        """Of all components in use: `A`, `B` or `E`."""
        kept = getattr(self, which)
        return [kept[i] for i in range(min(sum(self.counted), len(kept)))]

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
        rank = self.rank
        values = torch.cat([e if i < rank else e.detach() for i, e in enumerate(self.parts("E"))])
        return self.alpha / rank * values * torch.cat(tuple(self.parts("B")), 1), torch.cat(tuple(self.parts("A")))

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        added = super().forward(x, y0, host)
        if self.watched and self.training and added.requires_grad:
            entered = x.detach()
            added.register_hook(lambda g: self._watch(entered, g, host))
        return added

    @torch.no_grad()
    def _watch(self, x: Tensor, g: Tensor, host: Host) -> None:
        """Add sum |D * G| / sqrt(out in) of one backward pass; G is the gradient of the matrix D."""
        D = self.delta(host).float()
        _, G = host.pulled_back(x.float(), D, g.float(), to_x=False, to_M=True)
        assert G is not None
        found = (D * G).abs().sum() / math.sqrt(G.numel())
        self.sensitivity = found if self.sensitivity is None else self.sensitivity + found

    @torch.no_grad()
    def grow(self, by: int, reserve: int, step: int) -> None:
        """Activate components; `reserve` more wait after them. The update stays what it is, to rounding.

        Values are multiplied by new rank / old rank, against the scale alpha / rank that falls.
        """
        old, waiting = self.counted
        rank = old + by
        reserve = min(reserve, self.most - rank)
        for e in self.E[:old]:
            e.mul_(rank / old)
        self.born[0, old + waiting : rank + reserve] = step
        self.born[1, old:rank] = step
        self._count(rank, reserve)

    def stop(self) -> None:
        """No component waits any more."""
        self._count(self.rank, 0)

    @torch.no_grad()
    def settle(self) -> None:
        """Only active components are left, as one."""
        self.stop()
        for name, dim in (("A", 0), ("B", 1), ("E", 0)):
            whole = torch.cat([p.detach() for p in self.parts(name)], dim)
            setattr(self, name, nn.ParameterList([nn.Parameter(whole.contiguous())]))
        self.born = torch.zeros_like(self.born[:, :1])
        self.watched = False
