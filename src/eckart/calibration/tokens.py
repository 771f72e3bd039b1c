"""Windows of tokens: what calibration and evaluation run a model on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids. Padding lies behind the text, and `mask` is False on it."""

    ids: Int[Tensor, "n length"]
    mask: Bool[Tensor, "n length"]

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.mask.shape:
            raise ValueError(f"ids {tuple(self.ids.shape)} and mask {tuple(self.mask.shape)} must both be (n, length)")
        if self.ids.is_floating_point() or self.mask.dtype != torch.bool:
            raise TypeError(f"ids must be integers and mask bool, not {self.ids.dtype} and {self.mask.dtype}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, windows: slice) -> Tokens:
        return Tokens(self.ids[windows], self.mask[windows])

    @property
    def count(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())

    def split(self, size: int) -> list[Tokens]:
        """Batches of at most `size` windows, in order."""
        if size < 1:
            raise ValueError(f"a batch must hold at least one window, not {size}")
        return [self[start : start + size] for start in range(0, len(self), size)]

    def shard(self, rank: int, world: int) -> Tokens:
        """Every `world`-th window from `rank` on: the share of one of `world` workers."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of 0 to {world - 1}")
        if len(self) < world:
            raise ValueError(f"{len(self)} windows are too few for {world} workers; ask for at least {world}")
        return self[rank::world]

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a model's forward pass; there is an attention mask only where there is padding."""
        if bool(self.mask.all()):
            return {"input_ids": self.ids}
        return {"input_ids": self.ids, "attention_mask": self.mask.long()}

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """The `inputs` of each batch of at most `size` windows."""
        return [part.inputs() for part in self.split(size)]
