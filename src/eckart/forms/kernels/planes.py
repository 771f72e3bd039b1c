"""Codes decoded without putting them in order: the columns of a tile come by their place in a byte or word.

Packed codes repeat their places every few columns: 4-bit codes lie low and high in turn. Taking all low ones, then all
high ones, is whole-vector arithmetic; putting them side by side is not. So columns stay in that order, and activations,
of which there are fewer, are brought into it instead.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eckart.forms.grids import Uniform
from eckart.forms.kernels.prepared import Prepared
from eckart.forms.packing import unpack

if TYPE_CHECKING:
    from eckart.forms.quantized import QuantizedMatrix


class Planes:
    """Tiles of a matrix on a uniform grid: the numbers of `matrix.dense()`, computed in float32 at least.

    Args:
        at, matrix: of a layout that `serves`.
        dtype: of the tiles.
    """

    def __init__(self, at: Prepared, matrix: QuantizedMatrix, dtype: torch.dtype):
        self.at, self.codes, self.dtype, self.period = at, matrix.codes, dtype, _period(at.bits)
        self.scale = _float(matrix, "scale")
        self.grid: Uniform = at.grid  # type: ignore[assignment]
        self.zero: Tensor | None = None
        if not self.grid.symmetric:
            whole = self.grid.zero == "integer"
            self.zero = unpack(matrix.get_buffer("zero"), at.bits, at.count) if whole else _float(matrix, "zero")

    @staticmethod
    def serves(at: Prepared) -> bool:
        """Whether whole groups consist of whole words."""
        period = _period(at.bits)
        return at.middle is not None and at.width > 0 and at.width % at.group == 0 and at.group % period == 0

    def tile(self, rows: slice) -> Float[Tensor, "rows in"]:
        """Rows of the matrix, columns by planes."""
        codes, period, bits = self.codes[rows], self.period, self.at.bits
        W = torch.empty(codes.shape[0], self.at.width, dtype=self.scale.dtype, device=codes.device)
        words = codes.view(codes.shape[0], -1, period * bits // 8)
        for i, plane in enumerate(W.view(codes.shape[0], period, -1).unbind(1)):
            plane.copy_(_place(words, i, bits) if bits < 8 else codes)
        groups = W.view(codes.shape[0], period, self.at.count, -1)
        scale, middle = self.scale[rows, None, :, None], self.at.middle
        assert middle is not None
        if self.zero is None:
            groups.sub_(middle).mul_(scale)
        elif self.grid.zero == "real":
            groups.mul_(scale).add_(self.zero[rows, None, :, None])
        else:
            groups.sub_(self.zero[rows, None, :, None].to(W.dtype)).mul_(scale)
        return W.to(self.dtype)

    def arranged(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
        """Activations, columns by planes."""
        return x if self.period == 1 else x.unflatten(1, (-1, self.period)).transpose(1, 2).flatten(1)

    def restored(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows in"]:
        """The inverse of `arranged`."""
        return x if self.period == 1 else x.unflatten(1, (self.period, -1)).transpose(1, 2).flatten(1)


def _period(bits: int) -> int:
    """Codes after which places repeat."""
    return 8 // math.gcd(8, bits)


def _place(words: UInt8[Tensor, "rows words bytes"], i: int, bits: int) -> UInt8[Tensor, "rows words"]:
    """The i-th code of every word."""
    byte, shift = divmod(i * bits, 8)
    code = words[..., byte] >> shift
    if shift + bits > 8:
        code |= words[..., byte + 1] << (8 - shift)
    return code.bitwise_and_(2**bits - 1)


def _float(matrix: QuantizedMatrix, name: str) -> Float[Tensor, "out groups"]:
    stored = matrix.floats[name]
    dense: Tensor = stored.dense()  # type: ignore[operator]
    dtype = torch.promote_types(dense.dtype, torch.float32)  # in which arithmetic is faster than in 16 bits
    return dense.detach().T.to(dtype).contiguous()
