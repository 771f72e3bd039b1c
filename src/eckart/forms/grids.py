"""Grids: which numbers a code of a few bits may stand for, and how a group of weights chooses them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eckart.forms.base import FORMS
from eckart.forms.language import Vocabulary

GRIDS: Vocabulary[Grid] = Vocabulary("grid", within=FORMS)
Parameters = Mapping[str, Float[Tensor, "*groups k"]]


@dataclass(frozen=True)
class Slot:
    """One parameter of a grid, kept for every group: `width` numbers, floating point, or codes of `bits` bits."""

    width: int = 1
    bits: int | None = None


@dataclass(frozen=True)
class Grid(ABC):
    """Codes of b bits as numbers. All functions work on groups along the last dimension, any number of them at once.

    Parameters are handed about as floating point tensors (*groups, width), whatever they are stored as.
    """

    def __str__(self) -> str:
        return GRIDS.print(self)

    @abstractmethod
    def slots(self, bits: int) -> dict[str, Slot]:
        """What is stored for every group, by name."""

    @abstractmethod
    def fit(
        self, x: Float[Tensor, "*groups g"], bits: int, weight: Float[Tensor, "*#groups g"] | None = None
    ) -> dict[str, Float[Tensor, "*groups k"]]:
        """Parameters for every group, with the least weighted squared rounding error where the grid looks for it."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "*groups g"], p: Parameters, bits: int) -> UInt8[Tensor, "*groups g"]:
        """The code of the nearest number."""

    @abstractmethod
    def decode(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> Float[Tensor, "*groups g"]:
        """The numbers, in the parameters' dtype."""


@GRIDS.word("uniform")
@dataclass(frozen=True)
class Uniform(Grid):
    """Evenly spaced: scale * (code - zero), from the least to the largest weight of the group.

    Args:
        symmetric: the middle code stands for zero and no zero point is stored; b bits reach from -2^(b-1) to
            2^(b-1) - 1 steps (one bit: -1 and 1 steps of half the scale).
        zero: `integer` stores the zero point as a code, so that 0.0 is always on the grid; `real` stores the number
            that code 0 stands for, in floating point.
        search: shrunken ranges tried for the least (weighted) error, from the whole range down to a fifth of it;
            0 takes the whole range.
    """

    symmetric: bool = False
    zero: str = "integer"
    search: int = 0

    def __post_init__(self) -> None:
        if self.zero not in ("integer", "real"):
            raise ValueError(f"uniform(zero={self.zero!r}): it is 'integer' or 'real'")
        if not isinstance(self.search, int) or self.search < 0:
            raise ValueError(f"uniform(search={self.search!r}): the number of ranges tried is 0 or more")

    def slots(self, bits: int) -> dict[str, Slot]:
        if self.symmetric:
            return {"scale": Slot()}
        return {"scale": Slot(), "zero": Slot(bits=bits) if self.zero == "integer" else Slot()}

    def fit(
        self, x: Float[Tensor, "*groups g"], bits: int, weight: Float[Tensor, "*#groups g"] | None = None
    ) -> dict[str, Float[Tensor, "*groups k"]]:
        low, high = (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if x.shape[-1] else (x.sum(-1, True),) * 2
        best = self._between(low, high, bits)
        if not self.search:
            return best
        least = self._error(x, best, bits, weight)
        for step in range(1, self.search + 1):
            share = 1 - 0.8 * step / self.search
            tried = self._between(share * low, share * high, bits)
            error = self._error(x, tried, bits, weight)
            better = error < least
            best = {name: torch.where(better, tried[name], best[name]) for name in best}
            least = torch.where(better, error, least)
        return best

    def _between(self, low: Tensor, high: Tensor, bits: int) -> dict[str, Tensor]:
        """The grid whose ends are these numbers."""
        most = 2**bits - 1
        if self.symmetric:
            steps = 2 ** (bits - 1)  # below zero; there is one less above it, but for one bit
            scale = torch.maximum(-low / steps, high / max(1, steps - 1))
            return {"scale": torch.where(scale > 0, scale, 1.0)}
        if self.zero == "integer":
            low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / most
        if self.zero == "real":
            return {"scale": scale, "zero": low}
        scale = torch.where(scale > 0, scale, 1.0)
        return {"scale": scale, "zero": (-low / scale).round().clamp(0, most)}

    def _error(self, x: Tensor, p: Parameters, bits: int, weight: Tensor | None) -> Tensor:
        squared = (x - self.decode(self.encode(x, p, bits), p, bits)).square()
        return (squared if weight is None else squared * weight).sum(-1, keepdim=True)

    def encode(self, x: Float[Tensor, "*groups g"], p: Parameters, bits: int) -> UInt8[Tensor, "*groups g"]:
        scale = p["scale"]
        if not self.symmetric and self.zero == "real":
            code = (x - p["zero"]) / torch.where(scale == 0, 1.0, scale)
        else:
            code = x / scale + self._middle(p, bits)
        return code.round().clamp(0, 2**bits - 1).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> Float[Tensor, "*groups g"]:
        steps = codes.to(p["scale"].dtype)
        if not self.symmetric and self.zero == "real":
            return steps * p["scale"] + p["zero"]
        return (steps - self._middle(p, bits)) * p["scale"]

    def _middle(self, p: Parameters, bits: int) -> Tensor | float:
        """The code, not always whole, that stands for zero."""
        if not self.symmetric:
            return p["zero"]
        return 0.5 if bits == 1 else 2.0 ** (bits - 1)


class Scaled(Grid):
    """A fixed list of numbers from -1 to 1, times the group's largest absolute weight."""

    @abstractmethod
    def levels(self, bits: int) -> Float[Tensor, " levels"]:
        """The numbers, ascending, at most 2^bits of them, in float64."""

    def slots(self, bits: int) -> dict[str, Slot]:
        return {"scale": Slot()}

    def fit(
        self, x: Float[Tensor, "*groups g"], bits: int, weight: Float[Tensor, "*#groups g"] | None = None
    ) -> dict[str, Float[Tensor, "*groups k"]]:
        scale = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.sum(-1, keepdim=True)
        return {"scale": torch.where(scale > 0, scale, 1.0)}

    def encode(self, x: Float[Tensor, "*groups g"], p: Parameters, bits: int) -> UInt8[Tensor, "*groups g"]:
        levels = self.levels(bits).to(x)
        return torch.bucketize((x / p["scale"]).contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> Float[Tensor, "*groups g"]:
        levels = self.levels(bits).to(p["scale"])
        return levels[codes.long().clamp_max(len(levels) - 1)] * p["scale"]


@GRIDS.word("normal_float")
@dataclass(frozen=True)
class NormalFloat(Scaled):
    """NF-b: quantiles of a normal distribution between -1 and 1, zero among them (QLoRA, arXiv 2305.14314)."""

    OFFSET = 0.9677083

    def levels(self, bits: int) -> Float[Tensor, " levels"]:
        return normal_float(bits)


@functools.cache
def normal_float(bits: int) -> Float[Tensor, " levels"]:
    """2^bits quantiles, one more above zero than below it."""
    if bits == 1:
        return torch.tensor([-1.0, 1.0], dtype=torch.float64)
    half, ends = 2 ** (bits - 1), NormalFloat.OFFSET
    below = torch.linspace(1 - ends, 0.5, half, dtype=torch.float64)
    above = torch.linspace(0.5, ends, half + 1, dtype=torch.float64)
    levels = torch.special.ndtri(torch.cat([below, above[1:]]))
    return levels / levels[-1]


@GRIDS.word("shift")
@dataclass(frozen=True)
class Shift(Scaled):
    """Signed powers of two, 1, 1/2, 1/4, ... of the scale: multiplying is shifting. Zero is not among them."""

    def levels(self, bits: int) -> Float[Tensor, " levels"]:
        powers = 2.0 ** -torch.arange(2 ** (bits - 1), dtype=torch.float64)
        return torch.cat([-powers, powers.flip(0)])
