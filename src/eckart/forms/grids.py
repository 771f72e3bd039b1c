"""Grids: which numbers a code of a few bits may stand for, and how a group of weights chooses them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

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

    @property
    def unsearched(self) -> Grid:
        """The same grid, whose parameters are taken without looking for better ones."""
        return self

    @abstractmethod
    def slots(self, bits: int) -> dict[str, Slot]:
        """What is stored for every group, by name."""

    @abstractmethod
    def fit(
        self, x: Float[Tensor, "*groups g"], bits: int, weight: Float[Tensor, "*#groups g"] | None = None
    ) -> dict[str, Float[Tensor, "*groups k"]]:
        """Parameters for every group, with the least weighted squared rounding error where the grid looks for it.

        Numbers of weight zero are not asked for: the grid need not reach them.
        """

    @abstractmethod
    def encode(self, x: Float[Tensor, "*groups g"], p: Parameters, bits: int) -> UInt8[Tensor, "*groups g"]:
        """The code of the nearest number."""

    @abstractmethod
    def decode(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> Float[Tensor, "*groups g"]:
        """The numbers, in the parameters' dtype."""

    @abstractmethod
    def design(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> dict[str, Tensor]:
        """How the numbers depend on the floating point parameters: name -> (*groups, g, width).

        Numbers are linear in these: decode = sum over names of design @ parameter.
        """


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

    @property
    def unsearched(self) -> Grid:
        return replace(self, search=0)

    def slots(self, bits: int) -> dict[str, Slot]:
        if self.symmetric:
            return {"scale": Slot()}
        return {"scale": Slot(), "zero": Slot(bits=bits) if self.zero == "integer" else Slot()}

    def fit(
        self, x: Float[Tensor, "*groups g"], bits: int, weight: Float[Tensor, "*#groups g"] | None = None
    ) -> dict[str, Float[Tensor, "*groups k"]]:
        low, high = ends(x, weight)
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
            return {"scale": torch.maximum(-low / steps, high / max(1, steps - 1))}
        if self.zero == "integer":
            low, high = low.clamp_max(0), high.clamp_min(0)
        scale = (high - low) / most
        if self.zero == "real":
            return {"scale": scale, "zero": low}
        return {"scale": scale, "zero": (-low / divisor(scale)).round().clamp(0, most)}

    def _error(self, x: Tensor, p: Parameters, bits: int, weight: Tensor | None) -> Tensor:
        squared = (x - self.decode(self.encode(x, p, bits), p, bits)).square()
        return (squared if weight is None else squared * weight).sum(-1, keepdim=True)

    def encode(self, x: Float[Tensor, "*groups g"], p: Parameters, bits: int) -> UInt8[Tensor, "*groups g"]:
        scale = divisor(p["scale"])
        code = (x - p["zero"]) / scale if self._real else x / scale + self._middle(p, bits)
        return code.round().clamp(0, 2**bits - 1).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> Float[Tensor, "*groups g"]:
        steps = codes.to(p["scale"].dtype)
        if self._real:
            return steps * p["scale"] + p["zero"]
        return (steps - self._middle(p, bits)) * p["scale"]

    def design(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> dict[str, Tensor]:
        steps = codes.to(p["scale"].dtype)
        if self._real:
            return {"scale": steps[..., None], "zero": torch.ones_like(steps)[..., None]}
        return {"scale": (steps - self._middle(p, bits))[..., None]}

    @property
    def _real(self) -> bool:
        return not self.symmetric and self.zero == "real"

    def _middle(self, p: Parameters, bits: int) -> Tensor | float:
        """The code, not always whole, that stands for zero."""
        if not self.symmetric:
            return p["zero"]
        return 0.5 if bits == 1 else 2.0 ** (bits - 1)


def divisor(scale: Tensor) -> Tensor:
    """The scale, or 1 where it is 0 and nothing is asked for but zero."""
    return torch.where(scale == 0, 1.0, scale)


def ends(
    x: Float[Tensor, "*groups g"], weight: Float[Tensor, "*#groups g"] | None = None
) -> tuple[Float[Tensor, "*groups 1"], Float[Tensor, "*groups 1"]]:
    """The least and the largest number of every group, those of weight zero left out unless all are."""
    if not x.shape[-1]:
        return (x.sum(-1, keepdim=True),) * 2
    if weight is None:
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    out = (weight == 0) & (weight > 0).any(-1, keepdim=True)
    low, high = x.masked_fill(out, torch.inf), x.masked_fill(out, -torch.inf)
    return low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
