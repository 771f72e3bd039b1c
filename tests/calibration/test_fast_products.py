"""Calibration with factors rounded to bfloat16: the same statistics to its precision, and consistent ones."""

from __future__ import annotations

import pytest
import torch

import eckart
import tiny
from eckart.calibration.stream import fast_products
from eckart.linalg.whitening import psd_root
from eckart.metrics import Statistics

NEEDS = frozenset({"x", "outer"})


@pytest.mark.fast_products
def test_a_covariance_far_from_its_mean_stays_positive() -> None:
    x = 30 + torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    with fast_products():
        fast = Statistics()
        fast.add_inputs(x, NEEDS)
    mean = fast.mean("x")
    C = fast.mean("outer") - mean[:, None] * mean
    rounded = x.bfloat16().double()
    assert torch.allclose(C, (rounded - rounded.mean(0)).T @ (rounded - rounded.mean(0)) / 200, atol=1e-3)
    psd_root(C, 1e-6)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.fast_products
def test_a_model_compressed_with_fast_products_is_nearly_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.batches((6,), 12)
    fast, exact = tiny.build("llama"), tiny.build("llama")
    ours = eckart.compress(fast, "svd_llm", budget=0.8, data=data).result
    monkeypatch.setattr("eckart.calibration.stream.PRECISION", "highest")
    theirs = eckart.compress(exact, "svd_llm", budget=0.8, data=data).result
    assert [layer.form for layer in ours.layers] == [layer.form for layer in theirs.layers]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert a.measured_error == pytest.approx(b.measured_error, rel=0.05)
        assert a.measured_error != b.measured_error
