"""LoRA, as PEFT has it: what all other adapters are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from peft import LoraConfig, PeftConfig
from torch import nn

from eckart.adapters.native import BESIDE, Native
from eckart.registry import method
from eckart.settings import check_whole

STARTS = ("zero", "gaussian", "orthogonal")


@method("lora", family="low-rank", paper="LoRA, Hu et al., ICLR 2022, arXiv 2106.09685; DoRA, Liu et al., ICML 2024, arXiv 2402.09353")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class Lora(Native):
    """PEFT's LoRA, W + alpha / rank B A, or its DoRA, where each row has a trained length of its own.

    Starts that change the frozen weight (PiSSA, OLoRA) are left to PEFT itself: two adapters could not share a base.

    Args:
        rank: of the update.
        alpha: over the rank, the scale; 0 takes twice the rank.
        rooted: scale by alpha / sqrt(rank), as rsLoRA does.
        dora: train directions and lengths apart.
        start_from: `zero` (B = 0, A as PyTorch draws linear layers), `gaussian` (B = 0, A Gaussian), or `orthogonal`
            (both from one orthogonal matrix, with B A = 0).
    """

    rank: int = 8
    alpha: int = 0
    rooted: bool = False
    dora: bool = False
    start_from: str = "zero"

    of: ClassVar[type[PeftConfig]] = LoraConfig
    sits_on: ClassVar[tuple[type[nn.Module], ...]] = BESIDE

    def check(self) -> None:
        check_whole(self, rank=1, alpha=0)
        if self.start_from not in STARTS:
            raise ValueError(f"lora(start_from={self.start_from!r}): it is one of {', '.join(STARTS)}")
        if self.start_from == "orthogonal" and self.rank % 2:
            raise ValueError(f"lora(rank={self.rank}, start_from='orthogonal'): that start halves the rank, so make it even")  # fmt: skip # noqa: E501

    def fits(self, name: str, module: nn.Module, shape: tuple[int, int]) -> None:
        if self.rank > min(shape):
            raise ValueError(f"{name}: rank {self.rank} is more than a matrix of shape {shape} can have: lower it to {min(shape)} or leave the layer out")  # fmt: skip # noqa: E501

    def config(self) -> LoraConfig:
        start: Any = True if self.start_from == "zero" else self.start_from
        return LoraConfig(
            r=self.rank, lora_alpha=self.alpha or 2 * self.rank, lora_dropout=self.dropout, use_rslora=self.rooted,
            use_dora=self.dora, init_lora_weights=start, **self.targeting(),
        )  # fmt: skip
