"""Pyramid vector quantisation through models; its lattice and its lengths have tests of their own."""

from __future__ import annotations

from pathlib import Path

from quantised import check_method, correlated, heavy, lost

from eckart.compression.pvq import PVQ
from eckart.forms import parse
from eckart.linalg.weighting import Weighting
from eckart.testing import gaussian


def test_through_a_model(tmp_path: Path) -> None:
    result = check_method("pvq", tmp_path)
    assert any(layer.form.startswith("rotated(form=pyramid(pulses=") for layer in result.layers)


def test_better_than_rounding_at_no_more_bits() -> None:
    W, norm = heavy(), correlated()
    assert lost(W, "pyramid(pulses=20)", norm) < 0.7 * lost(W, "quantized(bits=3, group=64)", norm)


def test_a_column_that_stands_out_is_spread_first() -> None:
    W, form, norm = gaussian(48, 256), parse("pyramid(pulses=10)"), Weighting()
    W[:, 7] *= 20
    assert lost(W, PVQ().form.of(form), norm) < 0.7 * lost(W, form, norm)
