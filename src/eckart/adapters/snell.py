"""SNELL: sparse tuning whose dense candidate is merged from low-rank factors by a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eckart.adapters.base import Adapter
from eckart.adapters.host import Site
from eckart.adapters.kernelised import Kernelised, check_heads, check_survivors, drawn, entries_kept
from eckart.adapters.tuner import adapter


@adapter("snell", family="generated sparse", paper="SNELL, Shen et al., NeurIPS 2024, arXiv 2411.01800")
@dataclass
class SNELL(Adapter):
    """W + S(c sum_h (-1)^h ||Q_h[j] - P_h[i]||): as many numbers as LoRA, any rank, only the largest entries applied.

    S keeps a share of the entries and multiplies each by its own magnitude, as the authors' code does; the threshold is
    found anew in each pass. The matrix is made again in the backward pass, so that neither it nor a mask is stored. The
    start is small but not zero, as the gates of an update of zero would pass no gradient.

    Args:
        rank: r, over all heads: r (in + out) numbers are trained.
        sparsity: s, the share of entries that are dropped; at 0.0 all stay, unmultiplied.
        scale: c, of the distances.
        heads: pairs of factors; every other one is subtracted.
        p: of the norm that measures distances.
        survivors: `magnitude`, or `plain` where survivors are not multiplied: larger updates, and no competition.
    """

    rank: int = 8
    sparsity: float = 0.9
    scale: float = 0.1
    heads: int = 2
    p: float = 2.0
    survivors: str = "magnitude"

    exact_start: ClassVar[bool] = False

    def check(self) -> None:
        check_heads(self, self.rank, self.heads)
        check_survivors(self, self.survivors)
        self.positive(scale=self.scale)
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"snell(sparsity={self.sparsity!r}): it is a share from 0, below 1")
        if not self.p >= 1:
            raise ValueError(f"snell(p={self.p!r}): a norm has a power of 1 or more")

    def update(self, site: Site) -> Kernelised:
        P, Q = drawn(site, site.rank, self.heads)
        out, in_ = site.shape
        return Kernelised(P, Q, entries_kept(self.sparsity, out * in_), self.scale, self.p, self.survivors)
