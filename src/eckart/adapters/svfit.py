"""SVFit: fine-tuning the largest singular values."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.adapters.base import Adapter
from eckart.adapters.frames import Framed
from eckart.adapters.host import Site
from eckart.adapters.tuner import adapter
from eckart.linalg.svd import truncated_svd


@adapter("svfit", family="frozen frame", paper="SVFit, Sun et al., 2024, arXiv 2409.05926")
@dataclass
class SVFit(Adapter):
    """W + U_r (diag(s) - diag(s_0)) V_rᵀ: the r largest singular values are trained, their vectors are not.

    The additive form leaves the frozen weight alone, so several adapters can share it. The frame is saved with the
    values: the signs of singular vectors differ between machines. Give the values no weight decay, which would delete
    what the model knows.

    Args:
        rank: values of each matrix.
        energy: instead, the fewest values that hold this share of the sum of squares; 0 takes `rank`.
    """

    rank: int = 32
    energy: float = 0.0

    def check(self) -> None:
        self.at_least(rank=self.rank)
        if not 0 <= self.energy <= 1:
            raise ValueError(f"svfit(energy={self.energy!r}): it is a share of the spectrum, up to 1; 0 takes the rank")

    def update(self, site: Site) -> Framed:
        W = site.host.weight()
        if self.energy and site.name not in self.rank_pattern:
            svd = truncated_svd(W, purpose="spectrum")
            kept = svd.S.double().square().cumsum(0)
            self.rank_pattern[site.name] = rank = int((kept < self.energy * kept[-1]).sum()) + 1
        else:
            rank = self.fitting(site)
            svd = truncated_svd(W, rank)
        return Framed(svd.U[:, :rank], svd.S[:rank], svd.Vh[:rank])
