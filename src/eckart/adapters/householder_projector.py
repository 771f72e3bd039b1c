"""Householder Projector: a layer as orthonormal directions of input and output, which reflections turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import Adapter, Update
from eckart.adapters.frames import own
from eckart.adapters.host import Host, Site
from eckart.adapters.tuner import adapter
from eckart.linalg.svd import truncated_svd


class Projector(Update):
    """A - W, or A - A_0 where it is relative, with A = Q_U diag(s) Q_V of rank N.

    Q_U is the first N columns of H(u_1) H(u_2) ..., Q_Vᵀ those of H(v_1) H(v_2) ..., with H(v) = I - 2 v vᵀ / (vᵀ v).
    """

    s: Tensor
    left: Tensor | None
    right: Tensor | None

    def __init__(self, u: Tensor, v: Tensor, s: Float[Tensor, " N"], relative: bool):
        super().__init__()
        n = len(s)
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)
        self.register_buffer("s", own(s))
        self.register_buffer("left", own(turned(u, n) * s) if relative else None)
        self.register_buffer("right", own(turned(v, n).T) if relative else None)

    def A(self) -> tuple[Float[Tensor, "out N"], Float[Tensor, "N in"]]:
        """Q_U diag(s), and Q_V."""
        return turned(self.u, len(self.s)) * self.s, self.directions()

    def directions(self) -> Float[Tensor, "N in"]:
        """Q_V: orthonormal directions of the input; all that is at right angles to them leaves A x as it is."""
        return turned(self.v, len(self.s)).T

    def factors(self, host: Host) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]] | None:
        if self.left is None or self.right is None:
            return None
        left, right = self.A()
        return torch.cat([left, -self.left], 1), torch.cat([right, self.right])

    def delta(self, host: Host) -> Float[Tensor, "out in"]:
        left, right = self.factors(host) or self.A()
        return left @ right if self.left is not None else left @ right - host.weight().to(left.dtype)

    def forward(self, x: Tensor, y0: Tensor, host: Host) -> Tensor:
        left, right = self.factors(host) or self.A()
        y = host.up(host.down(x, right.to(x.dtype)), left.to(x.dtype))
        return y if self.left is not None else y - host.unbiased(y0.to(x.dtype))


def turned(vectors: Float[Tensor, "d k"], n: int) -> Float[Tensor, "d n"]:
    """The first n columns of H(v_1) ... H(v_k); a vector of zeros reflects nothing.

    The product is I - V T Vᵀ with T⁻¹ = I / 2 + the part of Vᵀ V above the diagonal (Joffrain et al., Accumulating
    Householder transformations, revisited, ACM TOMS 32, 2006): no reflection waits for another.
    """
    V = F.normalize(vectors, dim=0)
    inverse = torch.triu(V.T @ V, 1) + torch.eye(V.shape[1], dtype=V.dtype, device=V.device) / 2
    first = torch.eye(len(V), n, dtype=V.dtype, device=V.device)
    return first - V @ torch.linalg.solve_triangular(inverse, V[:n].T, upper=True)


def reflectors(Q: Float[Tensor, "d n"], count: int) -> tuple[Float[Tensor, "d count"], Float[Tensor, " n"]]:
    """Vectors whose reflections give orthonormal columns up to their signs, and these signs."""
    d, n = Q.shape
    vectors = torch.tril(torch.geqrf(Q)[0], -1) + torch.eye(d, n, dtype=Q.dtype, device=Q.device)
    more = torch.eye(d, dtype=Q.dtype, device=Q.device).flip(1)[:, torch.arange(count - n) // 2]  # twice is no change
    vectors = torch.cat([vectors, more], 1)
    return vectors, (turned(vectors, n) * Q).sum(0).sign()


@adapter("householder_projector", family="transforms", paper="Householder Projector, Song et al., ICCV 2023, arXiv 2307.08012")  # fmt: skip # noqa: E501
@dataclass
class HouseholderProjector(Adapter):
    """Replaces W by A = Q_U diag(s) Q_V of rank N with orthonormal Q_U and Q_V, products of trained reflections.

    They start from the singular vectors of W. A layer of full rank loses what lies beyond N directions, so the model
    does not start where it was, unless the update is `relative`. `update.directions()` are the N directions, for edits
    such as w + eps * v_i; as all of A's singular values may be equal, its SVD would give others.

    Args:
        rank: N.
        spectrum: `ones`; `mean` for the mean of W's N largest singular values; `own` for these themselves.
        reflections: for each side, at least N; 0 takes N, with which every choice of N directions can be reached.
            The paper has as many as the side is wide.
        relative: whether W + A - A_0 is trained instead, which starts exactly at W.
    """

    rank: int = 10
    spectrum: str = "ones"
    reflections: int = 0
    relative: bool = False

    exact_start: ClassVar[bool] = False

    def check(self) -> None:
        self.at_least(rank=self.rank)
        if self.spectrum not in ("ones", "mean", "own"):
            raise ValueError(f"{self.key}(spectrum={self.spectrum!r}): it is 'ones', 'mean' or 'own'")
        if self.reflections != 0:
            self.at_least(reflections=self.reflections)

    def update(self, site: Site) -> Projector:
        rank = self.fitting(site)
        count = self.reflections or rank
        if count < rank:
            raise ValueError(f"{site.name}: {count} reflections cannot turn {rank} directions freely: give at least as many as the rank")  # fmt: skip # noqa: E501
        found = truncated_svd(site.host.weight(), rank, purpose="spectrum")
        u, signs_u = reflectors(found.U[:, :rank], min(count, site.host.out))
        v, signs_v = reflectors(found.Vh[:rank].T.contiguous(), min(count, site.host.width))
        S = found.S[:rank]
        s = {"ones": torch.ones_like(S), "mean": S.mean().expand(rank), "own": S}[self.spectrum]
        return Projector(u, v, s * signs_u * signs_v, self.relative)
