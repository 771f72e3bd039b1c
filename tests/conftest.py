"""Lets every test import `tiny`, which lies beside this file, and compare calibration with exact sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging

from eckart.calibration import stream


@pytest.fixture(autouse=True)
def exact_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that are about the fast products ask for them with the marker `fast_products`."""
    if "fast_products" not in request.keywords:
        monkeypatch.setattr(stream, "PRECISION", "highest")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """No test depends on which ran before it: not on what they drew, nor on how loud they let transformers be."""
    torch.manual_seed(0)
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
