"""Codes come back as they went in, at every width and length, and take no more bytes than they must."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.forms.packing import pack, pack_wide, packed_width, unpack, unpack_wide


def codes_of(rows: int, n: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, n), generator=generator).to(torch.uint8)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 70), st.integers(0, 9))
def test_codes_come_back(bits: int, rows: int, n: int, seed: int) -> None:
    codes = codes_of(rows, n, bits, seed)
    packed = pack(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (rows, -(-n * bits // 8)))
    assert packed.shape[1] == packed_width(n, bits)
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_lie_lowest_first(bits: int) -> None:
    codes = codes_of(1, 19, bits)
    number = sum(int(c) << (bits * i) for i, c in enumerate(codes[0]))
    assert bytes(pack(codes, bits)[0].tolist()) == number.to_bytes(packed_width(19, bits), "little")


def test_rows_stand_alone() -> None:
    codes = codes_of(4, 11, 3)
    packed = pack(codes, 3)
    assert torch.equal(unpack(packed[[2, 0]], 3, 11), codes[[2, 0]])


@pytest.mark.parametrize("bits", [1, 5, 31, 46, 62])
@pytest.mark.parametrize("count", [0, 1, 3, 8])
def test_wide_numbers_come_back(bits: int, count: int) -> None:
    numbers = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(bits), dtype=torch.int64)
    numbers[:1] = 2**bits - 1
    packed = pack_wide(numbers, bits)
    assert packed.shape == (3, packed_width(count, bits))
    assert torch.equal(unpack_wide(packed, bits, count), numbers)
