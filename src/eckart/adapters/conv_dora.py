"""convDoRA: the magnitude of each output channel is trained apart from its direction."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.adapters.base import Update
from eckart.adapters.host import Site
from eckart.adapters.kernels import Decomposed
from eckart.adapters.lora_c import LoRAC
from eckart.adapters.tuner import adapter


@adapter("conv_dora", family="convolutions", paper="LoRA-based methods on U-Net, Minoccheri et al., 2025, arXiv 2508.01772")  # fmt: skip # noqa: E501
@dataclass
class ConvDoRA(LoRAC):
    """m V / ||V|| by output channel with V = W + (alpha / r) B A, of ConvLoRA's unfolding: convDoRA.

    Args:
        unfolding: `kernel`, or `channels` for DoRA-C, as in `lora_c`.
    """

    unfolding: str = "kernel"

    def update(self, site: Site) -> Update:
        return Decomposed(super().update(site), site.host)
