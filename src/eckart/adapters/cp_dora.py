"""CP-DoRA: CP-LoRA with the magnitude of each output channel trained apart from its direction."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.adapters.base import Update
from eckart.adapters.cp_lora import CPLoRA
from eckart.adapters.host import Site
from eckart.adapters.kernels import Decomposed
from eckart.adapters.tuner import adapter


@adapter("cp_dora", family="convolutions", paper="LoRA-based methods on U-Net, Minoccheri et al., 2025, arXiv 2508.01772")  # fmt: skip # noqa: E501
@dataclass
class CPDoRA(CPLoRA):
    """m V / ||V|| by output channel with V = W + CP-LoRA's update: r (O + I + h + w) + O numbers."""

    def update(self, site: Site) -> Update:
        return Decomposed(super().update(site), site.host)
