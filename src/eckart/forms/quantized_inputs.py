"""A matrix that rounds what it multiplies: activations in few bits, computed as a machine of few bits would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.forms.base import FORMS, Factored, Form
from eckart.forms.dense import Dense
from eckart.forms.quantized import Groups, Quantized
from eckart.forms.roundings import Nearest
from eckart.forms.wrapper import Wrapper


class QuantizedInputsMatrix(Factored):
    """`matrix`, which multiplies inputs rounded as `form.inputs` says.

    `dense()` is the matrix alone: what it does to inputs that are not rounded. Gradients pass through the rounding as
    if it were not there.

    Attributes:
        rounds: whether it does; see `unrounded`.
    """

    matrix: Factored
    form: QuantizedInputs

    def __init__(self, matrix: Factored, form: QuantizedInputs):
        super().__init__()
        self.matrix, self.shape, self.form, self.rounds = matrix, matrix.shape, form, True

    @property
    def exact(self) -> bool:
        return not self.rounds and super().exact

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        return self.matrix.forward(rounded(x, self.form.inputs) if self.rounds else x, bias)

    def dense(self) -> Float[Tensor, "out in"]:
        return self.matrix.dense()

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        return self.matrix.rows(ids)

    def flops(self, tokens: int) -> int:
        return tokens * self.shape[1] + self.matrix.flops(tokens)


@FORMS.word("quantized_inputs")
@dataclass(frozen=True)
class QuantizedInputs(Wrapper):
    """A matrix of any form on inputs that are rounded first, each group of each row on a grid found there and then.

    `quantized_inputs(matrix=quantized(bits=4), inputs=quantized(bits=4, group=None))` is what the field calls W4A4
    with dynamic quantisation per token. What rounding inputs costs is in no norm of a weight's error, so that fits and
    curves are those of the matrix alone. Nothing is stored for the inputs.

    Args:
        matrix: what multiplies the rounded inputs.
        inputs: bits, group (numbers of one row that share a grid; None for all) and grid of the inputs; its parameters
            are found in float32 and rounded to the dtype of the inputs.
    """

    inside: ClassVar[str] = "matrix"
    matrix: Form = field(default_factory=Quantized)
    inputs: Quantized = field(default_factory=lambda: Quantized(bits=8, group=None))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.inputs, Quantized) or self.inputs.open:
            raise ValueError(f"quantized_inputs(inputs={self.inputs}): they are quantized(bits=...), with all settings")
        if (self.inputs.rounding, self.inputs.scales) != (Nearest(), Dense()):
            raise ValueError(f"quantized_inputs(inputs={self.inputs}): inputs are rounded to the nearest number, and their scales are kept: leave rounding and scales out")  # fmt: skip # noqa: E501

    def around(self, module: Factored) -> QuantizedInputsMatrix:
        return QuantizedInputsMatrix(module, self)


def rounded(x: Float[Tensor, "*batch in"], inputs: Quantized) -> Float[Tensor, "*batch in"]:
    """x, every row by itself on the grids of its groups."""
    at = Groups(inputs, x.shape[-1])
    groups = at.split(x.detach().to(torch.promote_types(x.dtype, torch.float32)))
    p = {name: value.to(x.dtype).to(groups.dtype) for name, value in at.grid.fit(groups, at.bits).items()}
    values = at.joined(at.grid.decode(at.grid.encode(groups, p, at.bits), p, at.bits)).to(x.dtype)
    return values + (x - x.detach())  # adds zero, and the gradient


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Within the context, no matrix of a model rounds its inputs: what that costs is the difference."""
    rounding = [m for m in model.modules() if isinstance(m, QuantizedInputsMatrix) and m.rounds]
    try:
        for m in rounding:
            m.rounds = False
        yield
    finally:
        for m in rounding:
            m.rounds = True
