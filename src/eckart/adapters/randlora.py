"""RandLoRA: updates of full rank from shared random bases."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig, RandLoraConfig
from torch import nn

from eckart.adapters.native import Native
from eckart.registry import method
from eckart.settings import check_whole

BASES = ("dense", "sparse", "very_sparse")


@method("randlora", family="random bases", paper="RandLoRA, Albert et al., ICLR 2025, arXiv 2502.00987")
@dataclass(frozen=True)
class RandLora(Native):
    """PEFT's RandLoRA: W + alpha / rank * sum over j of B_j diag(lambda_j) A diag(gamma_j), B_j and A frozen.

    N = ceil(min(out, in) / rank) bases make any rank possible; N (rank + min(out, in)) numbers are trained in each
    layer, so that a smaller rank trains more. PEFT's scale alpha / rank lacks the 1 / sqrt(N) of the authors' code.
    `seed` draws the bases; sparse ones save no computation.

    Args:
        rank: of each base.
        alpha: 0 takes 20 times the rank. Where training is not stable, lower it or the learning rate.
        bases: `dense`, `sparse` (two thirds of the numbers are 0), or `very_sparse`.
        save_bases: write them into the checkpoint too, which then loads the same under any release of PyTorch.
    """

    rank: int = 32
    alpha: int = 0
    bases: str = "dense"
    save_bases: bool = True

    of: ClassVar[type[PeftConfig]] = RandLoraConfig

    def check(self) -> None:
        check_whole(self, rank=1, alpha=0)
        if self.bases not in BASES:
            raise ValueError(f"randlora(bases={self.bases!r}): they are {', '.join(map(repr, BASES))}")

    def fits(self, name: str, module: nn.Module, shape: tuple[int, int]) -> None:
        if self.rank > min(shape):
            raise ValueError(f"{name}: rank {self.rank} is more than a matrix of shape {shape} can have: lower it to {min(shape)} or leave the layer out")  # fmt: skip # noqa: E501

    def config(self) -> RandLoraConfig:
        with warnings.catch_warnings():  # PEFT warns of what `save_bases=False` says
            warnings.filterwarnings("ignore", message="Specified to not save basis_A")
            return RandLoraConfig(
                r=self.rank, randlora_alpha=self.alpha or 20 * self.rank, randlora_dropout=self.dropout,
                projection_prng_key=self.seed, save_projection=self.save_bases, sparse=self.bases == "sparse",
                very_sparse=self.bases == "very_sparse", target_modules=self.target_modules or "all-linear",
                modules_to_save=self.modules_to_save,
            )  # fmt: skip

    def start(self, model: nn.Module, config: PeftConfig, data: list[Any] | None, adapter_name: str) -> Any:
        if self.exclude_modules:  # which PEFT's settings of this method do not have
            config.target_modules = set(self.targets(model))
        return super().start(model, config, data, adapter_name)
