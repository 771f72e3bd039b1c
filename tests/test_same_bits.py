"""What is loaded computes to the bit what was saved."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.testing.numbers import gaussian


def lying_at(x: Tensor, offset: int) -> Tensor:
    """The same numbers in memory that begins so many numbers after a multiple of 64 bytes, as in a mapped file."""
    room = torch.empty(x.numel() + 32)
    start = -room.data_ptr() % 64 // 4 + offset
    return room[start : start + x.numel()].view(x.shape).copy_(x)


def test_a_product_does_not_depend_on_where_in_memory_its_factors_lie() -> None:
    x, W = gaussian(3, 10), gaussian(12, 10, seed=1)
    wanted = F.linear(x, W)
    assert all(torch.equal(F.linear(lying_at(x, i), lying_at(W, j)), wanted) for i in range(4) for j in range(4))
