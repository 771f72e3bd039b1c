"""Patterns: which sets of places a sparse matrix may keep, and the best such set for given scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from eckart.forms.base import Shape
from eckart.forms.places import Choices, Places, cheapest


@dataclass(frozen=True)
class Pattern(ABC):
    """The sets of places that a matrix of shape (out, in) may keep. All of them have the same size."""

    shape: Shape
    group: int = 1
    """Numbers in one place."""

    @property
    @abstractmethod
    def places(self) -> Places:
        """How the set is stored."""

    @abstractmethod
    def keep(self, scores: Float[Tensor, "out cols"], start: int = 0, per_row: bool = False) -> Bool[Tensor, "out cols"]:  # fmt: skip # noqa: E501
        """The set with the largest sum of scores, of which these columns, from `start` on, get their share.

        Earlier places win ties. Columns may be given in any number of runs that begin at multiples of `step`.

        Args:
            per_row: rows keep equally many, give or take one, where the pattern leaves that open.
        """

    def step(self, block: int) -> int:
        """Columns that must be chosen together, about `block` where any number will do."""
        return block

    def spread(self, M: Tensor) -> Tensor:
        """(out, in) -> (lines, width, group), as places are counted."""
        return M[..., None]

    def join(self, T: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return T[..., 0]


@dataclass(frozen=True)
class Anywhere(Pattern):
    """`count` places, each `group` consecutive columns of one row, the last of a row what is left of it.

    Args:
        even: every row keeps equally many; the rows divide the count.
    """

    count: int = 0
    even: bool = False

    @property
    def units(self) -> int:
        """Places in a row."""
        return -(-self.shape[1] // self.group)

    @property
    def places(self) -> Places:
        return cheapest(self.shape[0], self.units, self.count, self.even)

    def step(self, block: int) -> int:
        return max(self.group, block - block % self.group)

    def keep(self, scores: Float[Tensor, "out cols"], start: int = 0, per_row: bool = False) -> Bool[Tensor, "out cols"]:  # fmt: skip # noqa: E501
        out, cols = scores.shape
        units, all_units = -(-cols // self.group), max(1, self.units)
        first = start // self.group
        totals = F.pad(scores, (0, units * self.group - cols)).unflatten(1, (units, self.group)).sum(-1)
        if per_row or self.even:
            row = torch.arange(out + 1, device=scores.device) * self.count // max(1, out)
            kept = row.diff()
            kept = kept * (first + units) // all_units - kept * first // all_units
            mask = ranks(totals) < kept[:, None]
        else:
            kept_here = self.count * (first + units) // all_units - self.count * first // all_units
            best = totals.flatten().sort(descending=True, stable=True).indices[:kept_here]
            mask = torch.zeros(out * units, dtype=torch.bool, device=scores.device).index_fill(0, best, True)
            mask = mask.view(out, units)
        return mask.repeat_interleave(self.group, dim=1)[:, :cols]

    def spread(self, M: Tensor) -> Tensor:
        return F.pad(M, (0, self.units * self.group - self.shape[1])).unflatten(1, (self.units, self.group))

    def join(self, T: Tensor) -> Tensor:
        return T.flatten(1)[:, : self.shape[1]]


@dataclass(frozen=True)
class OfEvery(Pattern):
    """`n` of every `m` consecutive columns of a row."""

    n: int = 2
    m: int = 4

    @property
    def places(self) -> Places:
        return Choices.of(*self.shape, self.n, self.m)

    def step(self, block: int) -> int:
        return self.m

    def keep(self, scores: Float[Tensor, "out cols"], start: int = 0, per_row: bool = False) -> Bool[Tensor, "out cols"]:  # fmt: skip # noqa: E501
        cols = scores.shape[1]
        groups = -(-cols // self.m)
        filled = F.pad(scores, (0, groups * self.m - cols), value=-torch.inf).unflatten(1, (groups, self.m))
        return (ranks(filled) < self.n).flatten(1)[:, :cols]


@dataclass(frozen=True)
class EveryColumn(Pattern):
    """`nonzeros` of every column. Lines of the stored places are columns."""

    nonzeros: int = 1

    @property
    def places(self) -> Places:
        out, in_ = self.shape
        return cheapest(in_, out, in_ * self.nonzeros, even=True)

    def step(self, block: int) -> int:
        return 1

    def keep(self, scores: Float[Tensor, "out cols"], start: int = 0, per_row: bool = False) -> Bool[Tensor, "out cols"]:  # fmt: skip # noqa: E501
        return (ranks(scores.T) < self.nonzeros).T

    def spread(self, M: Tensor) -> Tensor:
        return M.T[..., None]

    def join(self, T: Tensor) -> Tensor:
        return T[..., 0].T


def ranks(scores: Float[Tensor, "*rows n"]) -> Tensor:
    """The rank of every number in its row, 0 for the largest, earlier ones first where they tie."""
    return scores.sort(dim=-1, descending=True, stable=True).indices.argsort(dim=-1)
