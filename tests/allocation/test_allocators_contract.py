"""Every registered allocator passes the battery that ships with the package."""

from __future__ import annotations

from eckart.allocation import Allocator
from eckart.testing import AllocatorContract


class TestAllocators(AllocatorContract):
    pass
