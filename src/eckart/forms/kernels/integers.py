"""Integer products: activations as digits of 8 bits, row by row, times codes as 8-bit integers, by oneDNN.

One digit rounds an activation to 127 steps up and down to the largest of its row; every further one divides what the
last has left by 254. Integer products and their sums are exact, so with three digits all that is lost is 2^-24 of the
row's largest activation in each, which is what float32 can hold. All digits go through one product as further rows.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from eckart.forms.kernels.prepared import Prepared

if TYPE_CHECKING:
    from eckart.forms.quantized import QuantizedMatrix

EXACT = 3
"""Digits that hold a float32."""
HALF = 96
"""Rows of activations up to which three digits are faster than decoding, where products of 16 bits are fast too."""
BASE = 254
BLOCK = 512


def serves(at: Prepared, x: Float[Tensor, "rows in"], digits: int) -> bool:
    """Whether codes are whole steps from a middle, with one scale a row, and the processor multiplies integers."""
    if at.middle is None or at.bits == 1 or at.count != 1 or x.dtype == torch.float64:
        return False
    short = x.dtype != torch.bfloat16 or digits < EXACT or x.shape[0] <= HALF
    return short and at.out * at.width > 0 and x.shape[0] > 0 and at.width < 2**16 and available()


def product(
    at: Prepared, matrix: QuantizedMatrix, x: Float[Tensor, "rows in"], digits: int
) -> Float[Tensor, "rows out"]:
    """x Wᵀ in float32, a block of rows of x at a time, whose digits' products are held together."""
    if x.shape[0] <= BLOCK:
        return _block(at, matrix, x, digits)
    y = torch.empty(x.shape[0], at.out)
    for i in range(0, x.shape[0], BLOCK):
        y[i : i + BLOCK] = _block(at, matrix, x[i : i + BLOCK], digits)
    return y


def _block(
    at: Prepared, matrix: QuantizedMatrix, x: Float[Tensor, "rows in"], digits: int
) -> Float[Tensor, "rows out"]:
    ops = torch.ops.onednn
    weight = at.keep("integers", [matrix.codes], lambda: ops.qlinear_prepack(at.signed(matrix), None))
    scale, shift, zeros = at.keep("integer scales", at.parameters(matrix), lambda: _scales(at, matrix))
    x = x.float()
    step = x.abs().amax(1, keepdim=True).div_(127).clamp_min_(1e-30)
    rows = _digits(x / step, digits)
    y = ops.qlinear_pointwise(rows, 1.0, 128, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
    parts = y.view(digits, x.shape[0], at.out)
    total = parts[-1]
    for i in range(digits - 2, -1, -1):
        total = torch.add(parts[i], total, alpha=1 / BASE, out=parts[i])
    total.mul_(step)
    return total if shift is None else total.addmm_(x.sum(1, keepdim=True), shift)


def _digits(z: Float[Tensor, "rows in"], count: int) -> UInt8[Tensor, "digits_rows in"]:
    """Unsigned and 128 above zero, which every processor can multiply."""
    if count == 1:
        return z.add_(128.5).to(torch.uint8)
    found = torch.empty(count, *z.shape, dtype=torch.uint8)
    for digit in found:
        nearest = z.round()
        z = z.sub_(nearest).mul_(BASE)
        digit.copy_(nearest.add_(128))
    return found.flatten(0, 1)


def _scales(at: Prepared, matrix: QuantizedMatrix) -> tuple[Tensor, Tensor | None, Tensor]:
    scale, shift = at.scale_and_shift(matrix)
    return scale[0].contiguous(), shift, torch.zeros(at.out, dtype=torch.int32)


@functools.cache
def available() -> bool:
    """Without these instructions oneDNN adds in 16 bits, which overflow."""
    has_instructions = getattr(torch.cpu, "_is_vnni_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and has_instructions() and hasattr(torch.ops.onednn, "qlinear_prepack")
