"""Two thin factors whose components are in order, of which the first few can be run alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from eckart.forms.base import Factored
from eckart.forms.dense import Dense
from eckart.forms.low_rank import LowRank


class NestedProduct(Factored):
    """left[:, :width] @ right[:width]. Its tensors are named as those of `low_rank`, whose form it has.

    Attributes:
        rank: (), how many components there are; those beyond take no part any more.
        width: how many are run, at most `rank`; 0 runs none, which leaves the bias.
    """

    rank: Tensor

    def __init__(self, left: Float[Tensor, "out r"], right: Float[Tensor, "r in"]):
        super().__init__()
        self.left, self.right = Dense().fit(left), Dense().fit(right)
        self.shape, self.form = (left.shape[0], right.shape[1]), LowRank(left.shape[1])
        self.register_buffer("rank", torch.tensor(left.shape[1]))
        self.width = left.shape[1]

    def factors(self, width: int | None = None) -> tuple[Float[Tensor, "out w"], Float[Tensor, "w in"]]:
        """The first components of both factors, as many as are run unless given."""
        width = self.width if width is None else width
        return self.left.weight[:, :width], self.right.weight[:width]

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        left, right = self.factors()
        return F.linear(F.linear(x, right), left, bias)

    def dense(self) -> Float[Tensor, "out in"]:
        left, right = self.factors()
        return left @ right

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        left, right = self.factors()
        return left[ids] @ right

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.width * (self.shape[0] + self.shape[1])
