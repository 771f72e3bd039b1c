"""LoLDU: fine-tuning the first pivots of an LDU decomposition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.adapters.base import Adapter
from eckart.adapters.frames import Framed
from eckart.adapters.host import Site
from eckart.adapters.tuner import adapter

LEAST = 1e-3
"""Of a pivot, beside the largest number in its row: by less no row is divided."""
STARTS: dict[str, Callable[[Tensor, Site], Tensor]] = {
    "pivots": lambda D, site: D,
    "zeros": lambda D, site: torch.zeros_like(D),
    "ones": lambda D, site: torch.ones_like(D),
    "constant": lambda D, site: torch.full_like(D, float(D.mean())),
    "uniform": lambda D, site: site.uniform(len(D), bound=float(D.mean().abs()) / 2).to(D.device),
    "normal": lambda D, site: D.mean() + site.normal(len(D)).to(D.device) * D.std(correction=0),
}


def ldu(W: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out m"], Float[Tensor, " m"], Float[Tensor, "m in"]]:
    """W = L diag(D) U with partial pivoting: L = P times a unit lower triangle, U unit upper, m = min(out, in).

    Where a pivot is below a thousandth of its row, as in matrices without full rank, that much of it (of 1 where the
    row is zero) takes its place in D, and U has less than one on the diagonal: the product is W all the same.
    """
    P, L, U = torch.linalg.lu(W)
    pivots, largest = U.diagonal(), U.abs().amax(1)
    floor = torch.where(largest > 0, LEAST * largest, 1.0)
    D = torch.where(pivots < 0, -1.0, 1.0) * pivots.abs().maximum(floor)
    return P @ L, D, U / D[:, None]


@adapter("loldu", family="frozen frame", paper="LoLDU, Shi et al., 2024, arXiv 2410.13618")
@dataclass
class LoLDU(Adapter):
    """W + alpha/r P L_r (diag(z) - diag(z_0)) U_r: r pivots are trained, the triangles are not.

    The pivots are the first ones, in the order of the elimination: they are not the most important, as singular values
    would be. Since z_0 is subtracted, the model is as before at any `start`, which matters to weight decay alone:
    with `zeros` it pulls towards the model as it was. The paper's released code subtracts the pivots whatever z_0 is.

    Args:
        rank: pivots of each matrix.
        alpha: over the rank, the scale; None takes the rank.
        start: of z: `pivots`, `zeros`, `ones`, or of the pivots' distribution `constant` (their mean), `uniform`
            (within half its size) or `normal` (mean and deviation).
    """

    rank: int = 32
    alpha: float | None = None
    start: str = "pivots"

    def check(self) -> None:
        self.at_least(rank=self.rank)
        if self.alpha is not None:
            self.positive(alpha=self.alpha)
        if self.start not in STARTS:
            raise ValueError(f"loldu(start={self.start!r}): it is one of {', '.join(STARTS)}")

    def update(self, site: Site) -> Framed:
        rank = self.fitting(site)
        L, D, U = ldu(site.host.weight())
        scale = 1.0 if self.alpha is None else self.alpha / rank
        return Framed(L[:, :rank], STARTS[self.start](D[:rank], site), U[:rank], scale)
