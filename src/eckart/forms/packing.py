"""Small unsigned integers stored without gaps: rows of `bits`-bit codes as bytes."""

from __future__ import annotations

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

WORD = 8
"""Codes that are packed together: eight of b bits fill b bytes."""


def packed_width(count: int, bits: int) -> int:
    """Bytes that `count` codes of one row take."""
    return (count * bits + 7) // 8


def pack(codes: UInt8[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Codes below 2^bits, one row after the other, lowest bits first; every row starts at a byte."""
    rows, n = codes.shape
    if bits == 8:
        return codes.contiguous().clone()
    filled = torch.nn.functional.pad(codes, (0, -n % WORD)).view(rows, -(-n // WORD), WORD).to(torch.int64)
    words = torch.zeros(filled.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(WORD):
        words |= filled[..., i] << (i * bits)
    parts = [(words >> (8 * i)) & 0xFF for i in range(bits)]
    packed = torch.stack(parts, dim=-1).to(torch.uint8).view(rows, filled.shape[1] * bits)
    return packed[:, : packed_width(n, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "rows bytes"], bits: int, count: int) -> UInt8[Tensor, "rows count"]:
    """The first `count` codes of every row."""
    rows = packed.shape[0]
    if bits == 8:
        return packed[:, :count]
    if WORD % bits == 0:  # no code crosses a byte
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        spread = (packed[..., None] >> shifts) & (2**bits - 1)
        return spread.view(rows, packed.shape[1] * (8 // bits))[:, :count]
    groups = -(-count // WORD)
    filled = torch.nn.functional.pad(packed, (0, groups * bits - packed.shape[1])).view(rows, groups, bits)
    words = torch.zeros(rows, groups, dtype=torch.int64, device=packed.device)
    for i in range(bits):
        words |= filled[..., i].to(torch.int64) << (8 * i)
    codes = torch.stack([(words >> (i * bits)) & (2**bits - 1) for i in range(WORD)], dim=-1)
    return codes.to(torch.uint8).view(rows, groups * WORD)[:, :count]


def pack_wide(numbers: Int64[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """The same for numbers of up to 63 bits."""
    rows, n = numbers.shape
    spread = (numbers[..., None] >> torch.arange(bits, device=numbers.device)) & 1
    return pack(spread.to(torch.uint8).view(rows, n * bits), 1)


def unpack_wide(packed: UInt8[Tensor, "rows bytes"], bits: int, count: int) -> Int64[Tensor, "rows count"]:
    """The first `count` numbers of every row."""
    spread = unpack(packed, 1, count * bits).view(packed.shape[0], count, bits)
    return (spread.to(torch.int64) << torch.arange(bits, device=packed.device)).sum(-1)
