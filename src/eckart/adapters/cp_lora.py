"""CP-LoRA: a kernel's update as a sum of rank-one tensors."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.adapters.base import Update
from eckart.adapters.host import Site
from eckart.adapters.kernels import Canonical, KernelAdapter, sides_of
from eckart.adapters.tuner import adapter


@adapter("cp_lora", family="convolutions", paper="LoRA-based methods on U-Net, Minoccheri et al., 2025, arXiv 2508.01772")  # fmt: skip # noqa: E501
@dataclass
class CPLoRA(KernelAdapter):
    """W[o, i, y, x] + (alpha / r) sum over q of a[o, q] b[i, q] c[y, q] d[x, q]: r (O + I + h + w) numbers.

    Kernels have one to three sides, and I is that of one group. Sides that are 1 have no factor, so on 1 x 1
    convolutions and linear layers it is LoRA. The rank may be larger than a side of the kernel: the paper found such
    updates the best.
    """

    def update(self, site: Site) -> Update:
        sides = sides_of(site.host)
        rank = site.rank if len(sides) > 2 else self.fitting(site)
        return Canonical(sides, rank, self.alpha / rank, site)
