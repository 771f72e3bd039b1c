"""SpQR against its card: bits to the bit, and half of GPTQ's error on heavy tails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from quantised import check_method, correlated, heavy, lost

from eckart.compression.spqr import SpQR
from eckart.forms import Sparse, WithOutliers
from eckart.linalg.weighting import PLAIN

REAL = "grid=uniform(zero='real')"
CODES = f"quantized(bits={{bits}}, group=16, {REAL}, rounding=gptq(), scales=quantized(bits=3, group=16, {REAL}))"


def test_through_a_model(tmp_path: Path) -> None:
    check_method("spqr", tmp_path, "0.9")


@pytest.mark.parametrize("bits", [3, 4])
def test_bits_are_the_papers_to_the_bit(bits: int) -> None:
    """b + (3 + 3) / 16 + 4 * 16 / 256 for the codes; 16 for each outlier's value, and its place as it is stored."""
    out, in_ = 256, 1024
    form = next(f for f in SpQR().form.ladder((out, in_)) if isinstance(f, WithOutliers) and f.dense.bits == bits)
    assert isinstance(form, WithOutliers)
    count = round(0.01 * out * in_)
    codes = out * in_ * bits + 2 * (out * in_ // 16) * 3 + 4 * 16 * (out * in_ // 256)
    places = 8 * Sparse(0.01).nbytes((out, in_), torch.float16) - 16 * count
    assert places == count * 16 + 32 * out or places == count * 16 + 32 * (out + 1)
    assert 8 * form.nbytes((out, in_), torch.float16) == codes + 16 * count + places


@pytest.mark.parametrize("seed", range(2))
def test_far_below_gptq_on_heavy_tails(seed: int) -> None:
    W, norm = heavy(seed), correlated()
    ours = lost(W, f"with_outliers({CODES.format(bits=4)}, sparse(density=0.01))", norm, torch.float16)
    theirs = lost(W, "quantized(bits=4, group=32, rounding=gptq())", norm, torch.float16)
    alone = lost(W, CODES.format(bits=4), norm, torch.float16)
    assert ours < 0.65 * theirs
    assert ours < alone


def test_rows_and_columns_that_groups_do_not_divide() -> None:
    W = heavy()[:37, :50]
    assert lost(W, f"with_outliers({CODES.format(bits=4)}, sparse(density=0.02))", PLAIN) < 0.02 * PLAIN.norm2(W)
