"""Every registered adapter keeps the contract."""

from __future__ import annotations

import pytest

from eckart.testing.adapters import AdapterContract, registered_adapters


@pytest.mark.parametrize("key", registered_adapters())
class TestAdapters(AdapterContract):
    pass
