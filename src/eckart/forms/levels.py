"""Grids that are lists of numbers: fixed ones times the group's scale, and lists that every group learns."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from eckart.forms.grids import GRIDS, Grid, Parameters, Slot, divisor, ends
from eckart.linalg.constants import constant
from eckart.linalg.kmeans1d import kmeans1d, nearest


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
        low, high = ends(x, weight)
        return {"scale": torch.maximum(-low, high)}

    def encode(self, x: Float[Tensor, "*groups g"], p: Parameters, bits: int) -> UInt8[Tensor, "*groups g"]:
        levels = self.levels(bits).to(x)
        return torch.bucketize((x / divisor(p["scale"])).contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> Float[Tensor, "*groups g"]:
        return self.design(codes, p, bits)["scale"][..., 0] * p["scale"]

    def design(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> dict[str, Tensor]:
        levels = self.levels(bits).to(p["scale"])
        return {"scale": levels[codes.long().clamp_max(len(levels) - 1)][..., None]}


@GRIDS.word("normal_float")
@dataclass(frozen=True)
class NormalFloat(Scaled):
    """NF-b: quantiles of a normal distribution between -1 and 1, zero among them (QLoRA, arXiv 2305.14314)."""

    def levels(self, bits: int) -> Float[Tensor, " levels"]:
        return normal_float(bits)


@constant
def normal_float(bits: int) -> Float[Tensor, " levels"]:
    """2^bits quantiles, one more above zero than below it.

    The outermost probability is the mean of where 2^bits and 2^bits - 1 even intervals have their last centre, which
    is the published 0.9677083 at four bits.
    """
    if bits == 1:
        return torch.tensor([-1.0, 1.0], dtype=torch.float64)
    count, half = 2**bits, 2 ** (bits - 1)
    end = 1 - (1 / (2 * count) + 1 / (2 * (count - 1))) / 2
    below = torch.linspace(1 - end, 0.5, half, dtype=torch.float64)
    above = torch.linspace(0.5, end, half + 1, dtype=torch.float64)
    levels = torch.special.ndtri(torch.cat([below, above[1:]]))
    return levels / levels[-1]


@GRIDS.word("shift")
@dataclass(frozen=True)
class Shift(Scaled):
    """Signed powers of two, 1, 1/2, 1/4, ... of the scale: multiplying is shifting. Zero is not among them."""

    def levels(self, bits: int) -> Float[Tensor, " levels"]:
        powers = 2.0 ** -torch.arange(2 ** (bits - 1), dtype=torch.float64)
        return torch.cat([-powers, powers.flip(0)])


@GRIDS.word("learned")
@dataclass(frozen=True)
class Learned(Grid):
    """2^b numbers of each group's own, by weighted k-means (SqueezeLLM, arXiv 2306.07629).

    They take 2^b numbers a group, so that groups want to be whole rows.
    """

    def slots(self, bits: int) -> dict[str, Slot]:
        return {"levels": Slot(2**bits)}

    def fit(
        self, x: Float[Tensor, "*groups g"], bits: int, weight: Float[Tensor, "*#groups g"] | None = None
    ) -> dict[str, Float[Tensor, "*groups k"]]:
        return {"levels": kmeans1d(x, 2**bits, weight)}

    def encode(self, x: Float[Tensor, "*groups g"], p: Parameters, bits: int) -> UInt8[Tensor, "*groups g"]:
        return nearest(x, p["levels"]).to(torch.uint8)

    def decode(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> Float[Tensor, "*groups g"]:
        return p["levels"].expand(*codes.shape[:-1], -1).gather(-1, codes.long())

    def design(self, codes: UInt8[Tensor, "*groups g"], p: Parameters, bits: int) -> dict[str, Tensor]:
        return {"levels": F.one_hot(codes.long(), 2**bits).to(p["levels"].dtype)}
