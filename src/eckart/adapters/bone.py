"""Bone, which PEFT calls MiSS: one small tensor, zero at the start, that all blocks of a weight share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import MissConfig, PeftConfig
from torch import nn

from eckart.adapters.native import Native
from eckart.forms.layers import kind_of
from eckart.registry import method
from eckart.settings import check_whole

MODES: dict[str, bool | str] = {"balance": True, "mini": "mini", "bat": "bat"}


@method("bone", family="shared blocks", paper="Bone / MiSS, Kang, 2024, arXiv 2409.15371")
@dataclass(frozen=True)
class Bone(Native):
    """PEFT's MiSS in its three forms; there is no scale, and `dropout` does nothing in `bat`.

    `balance`: W + [D^T D^T ... D^T], D of shape (rank, out): inputs that are `rank` apart share a column. Its gradient
    is a sum over in / rank blocks, so learning rates of LoRA may diverge. `mini`: D is a repeated (rank, mini_rank).
    `bat`, the block-affine form of the paper's abstract: each rank x rank block W_ij becomes W_ij (I + b_i) + b_i, with
    a matrix for every row of blocks; that of the author's training code, with one for every column of blocks, is
    `block_affine`.

    Args:
        rank: size of the blocks; r of PEFT.
        mode: `balance`, `mini` or `bat`.
        mini_rank: of `mini`; it divides the number of outputs.
    """

    rank: int = 32
    mode: str = "balance"
    mini_rank: int = 1

    of: ClassVar[type[PeftConfig]] = MissConfig

    def check(self) -> None:
        check_whole(self, rank=1, mini_rank=1)
        if self.mode not in MODES:
            raise ValueError(f"bone(mode={self.mode!r}): it is {', '.join(map(repr, MODES))}")

    def fits(self, name: str, module: nn.Module, shape: tuple[int, int]) -> None:
        out, in_ = shape
        if kind_of(module) != "linear":
            raise ValueError(f"{name} is a {type(module).__name__}, and MiSS of PEFT sits on linear layers alone: leave it out with exclude_modules")  # fmt: skip # noqa: E501
        if self.rank > in_:
            raise ValueError(f"{name}: rank {self.rank} is more than its {in_} inputs: lower it")
        if self.mode == "bat" and (out % self.rank or in_ % self.rank):
            raise ValueError(f"{name}: a matrix of shape {shape} cannot be cut into blocks of {self.rank} x {self.rank}: choose a rank that divides both, or leave the layer out")  # fmt: skip # noqa: E501
        if self.mode == "mini" and out % self.mini_rank:
            raise ValueError(f"{name}: mini_rank {self.mini_rank} does not divide its {out} outputs: choose one that does, or leave the layer out")  # fmt: skip # noqa: E501

    def config(self) -> MissConfig:
        return MissConfig(
            r=self.rank, miss_dropout=self.dropout, mini_r=self.mini_rank, init_weights=MODES[self.mode],
            **self.targeting(),
        )  # fmt: skip
