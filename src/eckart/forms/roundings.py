"""Roundings: how the codes of a matrix are chosen once its grid is known, or together with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eckart.forms.base import FORMS, Factored
from eckart.forms.language import Vocabulary
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import check_finite, gram_diagonal

ROUNDINGS: Vocabulary[Rounding] = Vocabulary("rounding", within=FORMS)
GroupParameters = Mapping[str, Float[Tensor, "out groups k"]]


@dataclass(frozen=True)
class Stored:
    """The grid's parameters for every group, as they come back from storage.

    Attributes:
        values: name -> the numbers.
        floats: name -> what holds those that are floating point.
    """

    values: GroupParameters
    floats: Mapping[str, Factored]


class Quantiser(Protocol):
    """A grid with its bits and groups, applied to a whole matrix."""

    bits: int
    group: int

    @property
    def rowwise(self) -> bool:
        """Whether each row's parameters are stored for themselves, so that those of single rows can be replaced."""
        ...

    def parameters(
        self, W: Float[Tensor, "out in"], weight: Float[Tensor, "#out in"] | None = None, *, searched: bool = True
    ) -> Stored:
        """Parameters that suit a matrix, whose entries of weight zero do not count."""
        ...

    def stored(self, values: GroupParameters) -> Stored:
        """Parameters, rounded as storage rounds them."""
        ...

    def encode(self, W: Float[Tensor, "out in"], p: Stored) -> UInt8[Tensor, "out in"]: ...

    def decode(self, codes: UInt8[Tensor, "out in"], p: Stored) -> Float[Tensor, "out in"]: ...

    def column(
        self, w: Float[Tensor, " out"], j: int, p: Stored
    ) -> tuple[UInt8[Tensor, " out"], Float[Tensor, " out"]]:
        """Codes and numbers of column j."""
        ...

    def design(self, codes: UInt8[Tensor, "out in"], p: Stored) -> dict[str, Float[Tensor, "out groups g k"]]:
        """How the numbers depend on the floating point parameters; zero in columns that only fill the last group."""
        ...


@dataclass(frozen=True)
class Rounding(ABC):
    """Chooses codes (out, in) and the grid's parameters for a matrix."""

    def __str__(self) -> str:
        return ROUNDINGS.print(self)

    @abstractmethod
    def round(
        self, W: Float[Tensor, "out in"], weighting: Weighting, quantiser: Quantiser
    ) -> tuple[UInt8[Tensor, "out in"], Stored]:
        """Codes, and the parameters as stored, with a small || Lᵀ (W - decoded) R ||."""


@ROUNDINGS.word("nearest")
@dataclass(frozen=True)
class Nearest(Rounding):
    """Every weight to the nearest number of its grid. A grid that searches does so under the diagonal of the weight."""

    def round(
        self, W: Float[Tensor, "out in"], weighting: Weighting, quantiser: Quantiser
    ) -> tuple[UInt8[Tensor, "out in"], Stored]:
        p = quantiser.parameters(W, column_weights(W, weighting))
        return quantiser.encode(W, p), p


@ROUNDINGS.word("stochastic")
@dataclass(frozen=True)
class Stochastic(Rounding):
    """Up or down to one of the two neighbours on the grid, by chance, so that the expected number is the weight itself.

    Weights beyond the grid go to its end.

    Args:
        seed: of the draw; equal matrices are rounded equally.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int):
            raise ValueError(f"stochastic(seed={self.seed!r}): the seed is a whole number")

    def round(
        self, W: Float[Tensor, "out in"], weighting: Weighting, quantiser: Quantiser
    ) -> tuple[UInt8[Tensor, "out in"], Stored]:
        p = quantiser.parameters(W, column_weights(W, weighting))
        codes, other, share = neighbours(W, p, quantiser)
        draw = torch.rand(W.shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        return torch.where(draw.to(W.device) < share, other, codes), p


def neighbours(
    W: Float[Tensor, "out in"], p: Stored, quantiser: Quantiser
) -> tuple[UInt8[Tensor, "out in"], UInt8[Tensor, "out in"], Float[Tensor, "out in"]]:
    """The code of the nearest number, that of the next one on the weight's other side, and how far towards it it lies.

    The way is from 0 to 1/2; it is 0 on a number of the grid and beyond its ends, where both codes are the same.
    """
    codes = quantiser.encode(W, p)
    value = quantiser.decode(codes, p)
    step = torch.where(value == W, 0, torch.where(value < W, 1, -1))
    other = (codes + step).clamp(0, 2**quantiser.bits - 1).to(torch.uint8)
    way = quantiser.decode(other, p) - value
    share = torch.where(way == 0, 0.0, (W - value) / torch.where(way == 0, 1.0, way)).clamp(0, 0.5)
    return codes, torch.where(share > 0, other, codes), share


class Between(NamedTuple):
    """Between which numbers of its grid every weight lies.

    Attributes:
        lower, upper: codes of the next numbers at or below it and above it; one and the same where the weight lies on
            a number of the grid or beyond its ends.
        way: how far from the lower to the upper number the weight lies, from 0 to 1; 1/2 where they are the same.
    """

    lower: UInt8[Tensor, "out in"]
    upper: UInt8[Tensor, "out in"]
    way: Float[Tensor, "out in"]


def between(W: Float[Tensor, "out in"], p: Stored, quantiser: Quantiser) -> Between:
    """Where the weights lie on a grid whose parameters are known.

    Raises `ValueError` where the parameters belong to a matrix of another size, a weight or parameter is not finite,
    or numbers fall as their codes rise.
    """
    check_finite(W, "the matrix")
    wanted = W.shape[0], -(-W.shape[1] // quantiser.group)
    for name, value in p.values.items():
        if tuple(value.shape[:2]) != wanted:
            raise ValueError(f"the grid's {name} is for {tuple(value.shape[:2])} rows and groups, the matrix has {wanted}")  # fmt: skip # noqa: E501
        check_finite(value, f"the grid's {name}")
    codes, other, share = neighbours(W, p, quantiser)
    first, last = (quantiser.decode(torch.full_like(codes, code), p) for code in (0, 2**quantiser.bits - 1))
    if bool((last < first).any()):
        raise ValueError("the grid's numbers fall as their codes rise: its scale is negative")
    down = other < codes
    lower, upper = torch.where(down, other, codes), torch.where(down, codes, other)
    way = torch.where(down, 1 - share, share)
    return Between(lower, upper, torch.where(lower == upper, 0.5, way))


def column_weights(W: Float[Tensor, "out in"], weighting: Weighting) -> Float[Tensor, "#out in"]:
    """How much single errors count within a row, couplings left out: weights of whole rows do not matter to a grid."""
    if weighting.each is not None:
        return weighting.each.to(W)
    return gram_diagonal(weighting.right, W.shape[1]).to(W)[None]
