"""A form times a fixed number: the weights of the terms of a sum that is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eckart.forms.base import FORMS, Factored, Form
from eckart.forms.dense import Dense
from eckart.forms.wrapper import Wrapper
from eckart.linalg.weighting import Weighting


class ScaledMatrix(Factored):
    """by * inner."""

    inner: Factored

    def __init__(self, inner: Factored, by: float, form: Form):
        super().__init__()
        self.inner, self.by, self.shape, self.form = inner, by, inner.shape, form

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        y = self.inner.forward(x) * self.by
        return y if bias is None else y + bias.to(y.dtype)  # which autocast has made narrow

    def dense(self) -> Float[Tensor, "out in"]:
        return self.inner.dense() * self.by

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        return self.inner.rows(ids) * self.by

    def flops(self, tokens: int) -> int:
        return self.inner.flops(tokens) + tokens * self.shape[0]


@FORMS.word("scaled")
@dataclass(frozen=True)
class Scaled(Wrapper):
    """by * form. A fit does not need it; training does, whose steps are as large as the number makes them.

    Args:
        form: what is scaled.
        by: a number other than 0.
    """

    form: Form = field(default_factory=Dense)
    by: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        by = self.by
        if isinstance(by, bool) or not isinstance(by, int | float) or not math.isfinite(by) or by == 0:
            raise ValueError(f"scaled(by={by!r}): it is a number other than 0")

    curve = Form.curve  # whose errors are those of what is scaled, not of what is fitted
    fits_rungs = Form.fits_rungs

    def around(self, module: Factored) -> ScaledMatrix:
        return ScaledMatrix(module, self.by, self)

    def within(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting
    ) -> tuple[Float[Tensor, "out in"], Weighting]:
        return matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32)) / self.by, weighting
