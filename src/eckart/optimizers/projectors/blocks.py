"""Whole tensors in turn: some have moments, the others none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from eckart.optimizers.modes import Factors
from eckart.optimizers.projectors.base import Draw, Projector

Order = Literal["random", "ascending", "descending", "mirror"]


@dataclass(frozen=True)
class Blocks(Projector):
    """A share of the tensors is active in each period; the group's density says how large a share (FRUGAL, section 4).

    Args:
        order: `ascending` and `descending` go through the tensors in their order, `mirror` takes them in pairs from
            both ends, `random` draws them.
    """

    orthonormal: ClassVar[bool] = False
    order: Order = "descending"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in get_args(Order):
            raise ValueError(f"the order of blocks is one of {', '.join(get_args(Order))}, not {self.order!r}")

    def ranks(self, shape: tuple[int, ...], group: Mapping[str, Any], draw: Draw) -> dict[int, int]:
        """No mode shrinks where the tensor is active; the first one shrinks to nothing where it is not."""
        if group["density"] is None:
            raise ValueError("blocks are whole tensors, which have no rank: give the group a density instead")
        return {} if draw.index in self.active(round(group["density"] * draw.count), draw) else {0: 0}

    def active(self, number: int, draw: Draw) -> set[int]:
        """Which `number` of all projected tensors have moments in this period."""
        n, start = draw.count, draw.refresh * number
        if self.order == "random":
            generator = torch.Generator().manual_seed(Draw(refresh=draw.refresh, seed=draw.seed).number)
            return set(torch.randperm(n, generator=generator)[:number].tolist())
        if self.order == "ascending":
            return {(start + j) % n for j in range(number)}
        if self.order == "descending":
            return {n - 1 - (start + j) % n for j in range(number)}
        if number % 2 or n % 2:
            raise ValueError(f"mirrored blocks go in pairs: {number} of {n} tensors would be active, and both must be even")  # fmt: skip # noqa: E501
        pairs = {(start // 2 + j) % (n // 2) for j in range(number // 2)}
        return pairs | {n - 1 - first for first in pairs}

    def find(self, A: Tensor, ranks: Mapping[int, int], old: Factors, draw: Draw) -> dict[int, Tensor]:
        return {}

    def nbytes(self, shape: tuple[int, ...], ranks: Mapping[int, int], dtype: torch.dtype) -> int:
        return 0
