"""Few rows of float32 times codes of 4 or 8 bits: torch's embedding bag, which sums table rows under weights.

The matrix's columns are the table's rows, an activation weighs its column, and a bag is one group of columns: the bag
sums (code - middle) * activation in float32, straight from the codes, and is then scaled. Rows of the matrix are taken
in chunks, so that sums stay in registers and the table is read from one end to the other.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from eckart.forms.kernels.prepared import Prepared
from eckart.linalg.constants import constant

if TYPE_CHECKING:
    from eckart.forms.quantized import QuantizedMatrix

CHUNK = 256
FEW = 4
"""Rows of activations up to which this is faster than decoding."""


def serves(at: Prepared, x: Float[Tensor, "rows in"]) -> bool:
    """Whether this is the way, for float32 and what converts to it."""
    return (
        at.middle is not None
        and 0 < x.shape[0] <= FEW
        and x.dtype != torch.float64
        and 0 < at.out * at.width * x.shape[0] < 2**31
        and at.group >= 16
        and available()
    )


@functools.cache
def available() -> bool:
    """Without FBGEMM, which is of x86, torch adds one number at a time."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def product(at: Prepared, matrix: QuantizedMatrix, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
    """x Wᵀ in float32."""
    table, chunks, size = at.keep("bag", [matrix.codes], lambda: _table(at, matrix))
    scale, shift = at.keep("bag scales", at.parameters(matrix), lambda: _scales(at, matrix))
    b, x = x.shape[0], x.float()
    ids, starts = _bags(chunks, b, at.width, at.group)
    weights = x.expand(chunks, *x.shape).reshape(-1)
    ops = torch.ops.quantized
    summed = ops.embedding_bag_4bit_rowwise_offsets if _width(at) == 4 else ops.embedding_bag_byte_rowwise_offsets
    y = summed(table, ids, starts, False, 0, False, weights, None, False)
    if at.count > 1:
        y = y.view(chunks, b, at.count, size).mul_(scale).sum(2)
    y = y.view(1, -1) if b == 1 else y.view(chunks, b, size).transpose(0, 1).reshape(b, chunks * size)
    y = y if chunks * size == at.out else y[:, : at.out]
    if at.count == 1:
        y = y.mul_(scale)
    return y if shift is None else torch.addmm(y, group_sums(at, x), shift)


def group_sums(at: Prepared, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows groups"]:
    """The sum of the activations of every group."""
    return F.pad(x, (0, at.count * at.group - at.width)).unflatten(1, (at.count, at.group)).sum(2)


def _width(at: Prepared) -> int:
    return 4 if at.bits <= 4 else 8


def _chunks(at: Prepared) -> tuple[int, int]:
    """How many chunks of how many rows, a multiple of 16."""
    count = -(-at.out // CHUNK)
    return count, -(-at.out // (16 * count)) * 16


def _table(at: Prepared, matrix: QuantizedMatrix) -> tuple[UInt8[Tensor, "chunks_in bytes"], int, int]:
    """A row for every chunk and column: its codes, the scale 1 and the bias -middle that the bag adds.

    Also how many chunks there are, of how many rows of the matrix.
    """
    assert at.middle is not None
    bits, (chunks, size) = _width(at), _chunks(at)
    ends = torch.tensor([1.0, -at.middle], dtype=torch.float16 if bits == 4 else torch.float32).view(torch.uint8)
    taken = size * bits // 8
    table = torch.empty(chunks * at.width, taken + len(ends), dtype=torch.uint8)
    table[:, taken:] = ends
    for i, rows in enumerate(table.view(chunks, at.width, -1)):
        codes = at.codes(matrix, slice(i * size, (i + 1) * size))
        codes = F.pad(codes, (0, 0, 0, size - codes.shape[0])).T.contiguous()
        rows[:, :taken] = codes[:, ::2] | (codes[:, 1::2] << 4) if bits == 4 else codes
    return table, chunks, size


def _scales(at: Prepared, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor | None]:
    """The scale of groups as (chunks, 1, groups, rows of the chunk), that of whole rows and the shift as they are."""
    scale, shift = at.scale_and_shift(matrix)
    if at.count == 1:
        return scale, shift
    chunks, size = _chunks(at)
    scale = F.pad(scale, (0, chunks * size - at.out)).unflatten(1, (chunks, size))
    return scale.transpose(0, 1)[:, None].contiguous(), shift


def _bags(chunks: int, b: int, width: int, group: int) -> tuple[Int32[Tensor, " n"], Int32[Tensor, " bags"]]:
    """The table rows of all bags, chunk by chunk for all rows of activations, and where each bag starts."""
    if b == 1:
        return _bags_of_one(chunks, width, group)
    ids = torch.arange(chunks * width, dtype=torch.int32).view(chunks, 1, width).expand(chunks, b, width).reshape(-1)
    return ids, _starts(chunks * b, width, group)


@constant
def _bags_of_one(chunks: int, width: int, group: int) -> tuple[Int32[Tensor, " n"], Int32[Tensor, " bags"]]:
    return torch.arange(chunks * width, dtype=torch.int32), _starts(chunks, width, group)


def _starts(sums: int, width: int, group: int) -> Int32[Tensor, " bags"]:
    within = torch.arange(0, width, group, dtype=torch.int32)
    return (torch.arange(sums, dtype=torch.int32)[:, None] * width + within).reshape(-1)
