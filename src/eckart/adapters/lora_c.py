"""LoRA-C and ConvLoRA: a kernel's update of low rank, by channels or by all its numbers."""

from __future__ import annotations

from dataclasses import dataclass

from eckart.adapters.base import Update
from eckart.adapters.host import Site
from eckart.adapters.kernels import KernelAdapter, low_rank
from eckart.adapters.tuner import adapter


@adapter("lora_c", family="convolutions", paper="LoRA-based methods on U-Net, Minoccheri et al., 2025, arXiv 2508.01772")  # fmt: skip # noqa: E501
@dataclass
class LoRAC(KernelAdapter):
    """W + (alpha / r) B A of the kernel as a matrix (out, in / groups * places), in one, two or three dimensions.

    It is a convolution to r channels, then one of 1 x 1; PEFT's LoRA does the same, save where the layer is grouped,
    dilated, or pads with other than zeros. In a grouped one all groups have A in common. On linear layers it is LoRA.

    Args:
        unfolding: `channels`, or `kernel` for ConvLoRA: B A is (out * height, in * width) and is read as the kernel.
    """

    unfolding: str = "channels"

    def check(self) -> None:
        super().check()
        if self.unfolding not in ("channels", "kernel"):
            raise ValueError(f"{self.key}(unfolding={self.unfolding!r}): it is 'channels' or 'kernel'")

    def update(self, site: Site) -> Update:
        rank = self.fitting(site)
        return low_rank(site, rank, self.alpha / rank, self.unfolding)
