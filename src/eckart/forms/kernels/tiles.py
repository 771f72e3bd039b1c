"""The exact way for any grid, dtype, device and number of rows: decode a tile of rows, multiply, forget it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eckart.forms.kernels.planes import Planes
from eckart.forms.kernels.prepared import prepared

if TYPE_CHECKING:
    from eckart.forms.quantized import QuantizedMatrix

TILE = 2**19
"""Numbers that are decoded at a time."""


class Ordered:
    """Tiles of any matrix, as its grid decodes them."""

    def __init__(self, matrix: QuantizedMatrix, dtype: torch.dtype):
        self.matrix, self.dtype = matrix, dtype

    def tile(self, rows: slice) -> Float[Tensor, "rows in"]:
        return self.matrix.decoded(rows).to(self.dtype)

    def arranged(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
        return x

    restored = arranged


def decoder(matrix: QuantizedMatrix, dtype: torch.dtype) -> Planes | Ordered:
    """The fastest way to decode the matrix."""
    at = prepared(matrix)
    return Planes(at, matrix, dtype) if Planes.serves(at) else Ordered(matrix, dtype)


def tiles(matrix: QuantizedMatrix) -> list[slice]:
    """All rows of the matrix, a tile at a time."""
    out, width = matrix.shape
    size = max(1, TILE // max(1, width))
    return [slice(i, min(i + size, out)) for i in range(0, out, size)]


@torch.no_grad()
def product(matrix: QuantizedMatrix, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
    """x Wᵀ in the dtype of x, without gradients."""
    parts, by = tiles(matrix), decoder(matrix, x.dtype)
    x = by.arranged(x)
    if len(parts) == 1:
        return F.linear(x, by.tile(parts[0]))
    y = x.new_empty(x.shape[0], matrix.shape[0])
    for rows in parts:
        torch.mm(x, by.tile(rows).T, out=y[:, rows])
    return y


@torch.no_grad()
def gradient(matrix: QuantizedMatrix, g: Float[Tensor, "rows out"]) -> Float[Tensor, "rows in"]:
    """g W, summed in float32 or better, so that rounding does not grow with the number of tiles."""
    by = decoder(matrix, g.dtype)
    total = g.new_zeros(g.shape[0], matrix.shape[1], dtype=torch.promote_types(g.dtype, torch.float32))
    for rows in tiles(matrix):
        total += g[:, rows] @ by.tile(rows)
    return by.restored(total)


def parameter_gradients(
    matrix: QuantizedMatrix, g: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"], wanted: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of sum(g * x Wᵀ) with respect to the `wanted` parameters of the matrix."""
    found: list[Tensor | None] = [None] * len(wanted)
    for rows in tiles(matrix):
        with torch.enable_grad():
            W = matrix.decoded(rows)
        parts = torch.autograd.grad(W, wanted, (g[:, rows].T @ x).to(W.dtype), allow_unused=True)
        found = [a if b is None else b if a is None else a + b for a, b in zip(found, parts, strict=True)]
    return found
