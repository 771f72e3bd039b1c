"""How a buffer of an optimiser is kept between steps: as it is, or in blocks of a few bits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eckart.forms.grids import Grid, Uniform
from eckart.forms.levels import Scaled
from eckart.forms.packing import pack, packed_width, unpack
from eckart.linalg.constants import constant

State = dict[str, Any]
"""What an optimiser keeps for one parameter: tensors, numbers and tuples of numbers, by name."""


@dataclass(frozen=True)
class Storage(ABC):
    """Puts a tensor into a state under a name, and gets it back."""

    @abstractmethod
    def put(self, state: State, name: str, x: Tensor) -> None: ...

    @abstractmethod
    def get(self, state: State, name: str) -> Tensor | None:
        """The tensor, or None where nothing has been put; writing into it may or may not write into the state."""

    @abstractmethod
    def drop(self, state: State, name: str) -> None:
        """Forget what was put under that name, if anything was."""

    @abstractmethod
    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of the tensors that a `put` of this shape and dtype keeps."""


@dataclass(frozen=True)
class Plain(Storage):
    """As it is."""

    def put(self, state: State, name: str, x: Tensor) -> None:
        state[name] = x

    def get(self, state: State, name: str) -> Tensor | None:
        return state.get(name)

    def drop(self, state: State, name: str) -> None:
        state.pop(name, None)

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class Blocks(Storage):
    """Packed codes of `bits` bits, with a grid's parameters (float32, or whole bytes) for every block.

    Args:
        bits: of a code, 1 to 8.
        group: numbers in a block, along the flattened tensor; each slice along the last dimension where None.
        grid: which numbers the codes stand for.
        root: keep the square root of the (non-negative) numbers, whose range is half as many orders of magnitude.
    """

    bits: int = 8
    group: int | None = 256
    grid: Grid = field(default_factory=Uniform)
    root: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"a code has 1 to 8 bits, not {self.bits}")
        if self.group is not None and self.group < 1:
            raise ValueError(f"a block holds at least one number, not {self.group}")

    def put(self, state: State, name: str, x: Tensor) -> None:
        blocks = self.blocks(x.sqrt() if self.root else x)
        parameters = self.grid.fit(blocks, self.bits)
        state[f"{name}.codes"] = pack(self.grid.encode(blocks, parameters, self.bits), self.bits)
        for slot, kept in self.grid.slots(self.bits).items():
            state[f"{name}.{slot}"] = parameters[slot].to(torch.float32 if kept.bits is None else torch.uint8)
        state[f"{name}.shape"] = tuple(x.shape)

    def get(self, state: State, name: str) -> Tensor | None:
        if f"{name}.codes" not in state:
            return None
        shape = tuple(state[f"{name}.shape"])
        parameters = {slot: state[f"{name}.{slot}"].float() for slot in self.grid.slots(self.bits)}
        codes = unpack(state[f"{name}.codes"], self.bits, self._group(shape))
        x = self.grid.decode(codes, parameters, self.bits).flatten()[: math.prod(shape)].view(shape)
        return x.square() if self.root else x

    def drop(self, state: State, name: str) -> None:
        for part in ("codes", "shape", *self.grid.slots(self.bits)):
            state.pop(f"{name}.{part}", None)

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        group = self._group(shape)
        side = sum(slot.width * (4 if slot.bits is None else 1) for slot in self.grid.slots(self.bits).values())
        return -(-math.prod(shape) // group) * (packed_width(group, self.bits) + side)

    def blocks(self, x: Tensor) -> Float[Tensor, "blocks group"]:
        """The numbers in blocks; zeros fill the last one."""
        flat, group = x.float().flatten(), self._group(tuple(x.shape))
        return F.pad(flat, (0, -flat.numel() % group)).view(-1, group)

    def _group(self, shape: tuple[int, ...]) -> int:
        return min(self.group, max(1, math.prod(shape))) if self.group else max(1, shape[-1])


@dataclass(frozen=True)
class Dynamic(Scaled):
    """Numbers over seven orders of magnitude, more densely spaced at the top (8-bit optimizers, arXiv 2110.02861).

    Every decade below the largest number has half as many levels as the one above it.

    Args:
        signed: levels on both sides of zero, or on one only and twice as many.
    """

    signed: bool = True

    def levels(self, bits: int) -> Float[Tensor, " levels"]:
        return dynamic_levels(bits, self.signed)


@constant
def dynamic_levels(bits: int, signed: bool) -> Float[Tensor, " levels"]:
    """2^bits numbers: zero, one, and the middles of 2^k (or 2^(k+1)) even parts of the k-th decade."""
    parts = []
    for k in range(bits - 1):
        ends = torch.linspace(0.1, 1, 2 ** (k if signed else k + 1) + 1, dtype=torch.float64)
        parts.append((ends[1:] + ends[:-1]) / 2 * 10.0 ** (k - bits + 2))
    positive = torch.cat(parts)
    both = torch.cat([-positive, positive]) if signed else positive
    return torch.cat([both, torch.tensor([0.0, 1.0], dtype=torch.float64)]).sort().values
