"""The product with a sparse matrix while it is trained: nothing of the size of the matrix is kept for backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from eckart.forms.patterns import Pattern


def scattered_product(
    x: Float[Tensor, "*batch in"], values: Float[Tensor, "places ..."], flat: Int[Tensor, " places"],
    pattern: Pattern, bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:  # fmt: skip
    """x Wᵀ + bias, where W holds `values` at the places `flat` of the pattern, counted line * width + place.

    W is formed in the forward pass and once more in the backward pass; in between only x, the values and their places
    are kept (SLTrain, Han et al., NeurIPS 2024, arXiv 2406.02214).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, values = x.to(dtype), values.to(dtype)
    y: Tensor = _Scattered.apply(x, values, flat, pattern)
    return y if bias is None else y + bias.to(y.dtype)


def placed(
    values: Float[Tensor, "places ..."], flat: Int[Tensor, " places"], pattern: Pattern
) -> Float[Tensor, "out in"]:
    """The matrix that holds these values at these places."""
    places = pattern.places
    table = values.new_zeros(places.lines * places.width, *values.shape[1:]).index_copy(0, flat, values)
    return pattern.join(table.view(places.lines, places.width, pattern.group))


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, flat: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x, values, flat)
        ctx.pattern = pattern
        return F.linear(x, placed(values, flat, pattern))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, values, flat = ctx.saved_tensors
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = g @ placed(values, flat, ctx.pattern)
        if ctx.needs_input_grad[1]:
            out, in_ = ctx.pattern.shape
            G = g.reshape(-1, out).T @ x.reshape(-1, in_)
            dvalues = ctx.pattern.spread(G).reshape(-1, *values.shape[1:])[flat]
        return dx, dvalues, None, None
