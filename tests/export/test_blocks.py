"""Packed codes as GGUF's blocks: the very same numbers, or a reason why not."""

from __future__ import annotations

import copy

import gguf
import numpy as np
import pytest
import torch

import eckart
from eckart.export.blocks import BLOCK, Blocks, Unfit, blocks_of
from eckart.forms.quantized import QuantizedMatrix

SYMMETRIC, REAL, WHOLE = "uniform(symmetric=True)", "uniform(zero='real')", "uniform()"


def quantised(bits: int, grid: str, group: object = 32, shape: tuple[int, int] = (7, 96), dtype: torch.dtype = torch.float16, more: str = "") -> QuantizedMatrix:  # fmt: skip # noqa: E501
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(bits)) + 0.3
    matrix = eckart.fit(f"quantized(bits={bits}, group={group}, grid={grid}{more})", weights, dtype=dtype)
    assert isinstance(matrix, QuantizedMatrix)
    return matrix


def same_numbers(blocks: Blocks, matrix: QuantizedMatrix) -> bool:
    """Whether GGUF's own reader finds the matrix's numbers in the blocks, to the last bit of float32."""
    found = torch.from_numpy(gguf.quants.dequantize(blocks.data, blocks.type))
    return torch.equal(found, copy.deepcopy(matrix).float().dense())


@pytest.mark.parametrize(
    ("bits", "grid", "group", "kind"),
    [
        (8, SYMMETRIC, 32, "Q8_0"), (4, SYMMETRIC, 32, "Q4_0"), (5, SYMMETRIC, 32, "Q5_0"), (6, SYMMETRIC, 32, "Q8_0"),
        (2, SYMMETRIC, 32, "Q4_0"), (4, REAL, 32, "Q4_1"), (5, REAL, 32, "Q5_1"), (3, REAL, 32, "Q4_1"),
        (3, WHOLE, 32, "Q4_0"), (7, WHOLE, 32, "Q8_0"), (4, SYMMETRIC, 64, "Q4_0"), (4, SYMMETRIC, None, "Q4_0"),
        (4, REAL, 96, "Q4_1"),
    ],
)  # fmt: skip
def test_the_blocks_hold_the_same_numbers(bits: int, grid: str, group: object, kind: str) -> None:
    matrix = quantised(bits, grid, group)
    blocks = blocks_of(matrix)
    assert blocks.type.name == kind
    assert blocks.rounded == 0
    assert same_numbers(blocks, matrix)
    if "zero" not in matrix.floats:  # one product is rounded once, whichever way it is computed
        found = torch.from_numpy(gguf.quants.dequantize(blocks.data, blocks.type))
        assert torch.equal(found.half(), matrix.dense())
    assert not same_numbers(blocks._replace(data=np.roll(blocks.data, 1, axis=0)), matrix)


def test_four_bits_with_a_whole_zero_point_need_the_reach_of_five() -> None:
    skewed = torch.rand((3, 64), generator=torch.Generator().manual_seed(0))
    matrix = eckart.fit("quantized(bits=4, group=32)", skewed, dtype=torch.float16)
    assert isinstance(matrix, QuantizedMatrix)
    assert blocks_of(matrix).type.name == "Q5_0"
    assert same_numbers(blocks_of(matrix), matrix)


def test_own_blocks_survive_the_trip_back() -> None:
    """What GGUF's quantiser makes of the numbers of a Q8_0 matrix are the blocks it came from."""
    blocks = blocks_of(quantised(8, SYMMETRIC))
    numbers = gguf.quants.dequantize(blocks.data, blocks.type)
    again = gguf.quants.dequantize(gguf.quants.quantize(numbers, blocks.type), blocks.type)
    np.testing.assert_allclose(again, numbers, atol=np.abs(numbers).max() / 127)


def test_scales_of_another_dtype_are_rounded_and_that_is_said() -> None:
    matrix = quantised(4, SYMMETRIC, dtype=torch.float32)
    blocks = blocks_of(matrix)
    assert 0 < blocks.rounded <= 2**-11
    assert not same_numbers(blocks, matrix)
    numbers = torch.from_numpy(gguf.quants.dequantize(blocks.data, blocks.type))
    torch.testing.assert_close(numbers, matrix.dense(), rtol=blocks.rounded * 1.001, atol=0)


def test_scales_that_are_quantised_themselves() -> None:
    matrix = quantised(4, SYMMETRIC, more=", scales=quantized(bits=8, group=4)")
    blocks = blocks_of(matrix)
    found = torch.from_numpy(gguf.quants.dequantize(blocks.data, blocks.type))
    assert torch.equal(found.half(), matrix.dense())


@pytest.mark.parametrize(
    ("matrix", "why"),
    [
        (lambda: quantised(4, SYMMETRIC, shape=(4, 40)), "40 columns are not a multiple of 32"),
        (lambda: quantised(4, SYMMETRIC, 48), "groups of 48 columns"),
        (lambda: quantised(4, "normal_float()"), "normal_float.* are not whole steps apart"),
        (lambda: quantised(4, "learned()"), "not evenly spaced"),
        (lambda: quantised(8, REAL), "steps from 0 to 255 are more than Q5_1 reaches"),
        (lambda: quantised(1, SYMMETRIC), "not whole steps"),
    ],
)
def test_what_no_type_holds_is_named(matrix: object, why: str) -> None:
    with pytest.raises(Unfit, match=why):
        blocks_of(matrix())  # type: ignore[operator]


def test_scales_beyond_float16_are_refused() -> None:
    weights = torch.randn(2, BLOCK) * 1e-9
    matrix = eckart.fit(f"quantized(bits=4, group=32, grid={SYMMETRIC})", weights)
    assert isinstance(matrix, QuantizedMatrix)
    with pytest.raises(Unfit, match="too small or too large"):
        blocks_of(matrix)


def test_a_matrix_of_zeros() -> None:
    matrix = eckart.fit(f"quantized(bits=4, group=32, grid={SYMMETRIC})", torch.zeros(2, BLOCK))
    assert isinstance(matrix, QuantizedMatrix)
    assert same_numbers(blocks_of(matrix), matrix)
