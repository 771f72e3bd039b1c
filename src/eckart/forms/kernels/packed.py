"""bfloat16 activations times groups of codes of up to 4 bits: torch's kernel for packed weights, adding in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms.kernels.prepared import Prepared

if TYPE_CHECKING:
    from eckart.forms.quantized import QuantizedMatrix

FEW = 16
"""Rows of activations up to which this is faster than decoding."""
BLOCK = 64


def serves(at: Prepared, x: Float[Tensor, "rows in"]) -> bool:
    """Whether the layout is one that the kernel knows."""
    known = at.middle is not None and 2 <= at.bits <= 4 and at.group in (32, 64, 128, 256)
    whole = at.width % at.group == 0 and at.out % BLOCK == 0 and at.out > 0
    return known and whole and x.dtype == torch.bfloat16 and 0 < x.shape[0] <= FEW


def product(at: Prepared, matrix: QuantizedMatrix, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
    """x Wᵀ in bfloat16."""
    codes = at.keep("packed", [matrix.codes], lambda: _packed(at, matrix))
    scales = at.keep("packed scales", at.parameters(matrix), lambda: _scales(at, matrix))
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), codes, at.group, scales)


def _packed(at: Prepared, matrix: QuantizedMatrix) -> Tensor:
    """The kernel reads blocks of rows, so that blocks are packed one at a time. It takes code 8 for zero."""
    assert at.middle is not None
    up = 8 - int(at.middle)
    return torch.cat(
        [
            torch.ops.aten._convert_weight_to_int4pack_for_cpu(at.codes(matrix, slice(i, i + BLOCK)).int() + up, 1)
            for i in range(0, at.out, BLOCK)
        ]
    )


def _scales(at: Prepared, matrix: QuantizedMatrix) -> Tensor:
    scale, shift = at.scale_and_shift(matrix)
    return torch.stack([scale, torch.zeros_like(scale) if shift is None else shift], dim=-1).to(torch.bfloat16)
