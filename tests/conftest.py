"""Lets every test import `tiny`, which lies beside this file, and compare calibration with exact sums."""

from __future__ import annotations

import pytest

from eckart.calibration import stream


@pytest.fixture(autouse=True)
def exact_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that are about the fast products ask for them with the marker `fast_products`."""
    if "fast_products" not in request.keywords:
        monkeypatch.setattr(stream, "PRECISION", "highest")
