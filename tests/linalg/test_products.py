"""The SVD of a product of thin matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from eckart.linalg.products import svd_of_product


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_thin_route_is_the_svd_of_the_whole_product() -> None:
    for m, r, n in ((30, 5, 20), (4, 9, 6), (7, 7, 3), (1, 2, 5)):
        B, A = gaussian(m, r), gaussian(r, n, seed=1)
        U, S, V = svd_of_product(B, A)
        whole = torch.linalg.svdvals(B.double() @ A.double())
        assert len(S) == min(m, r, n)
        torch.testing.assert_close(S, whole[: len(S)], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close((U * S) @ V, B.double() @ A.double(), rtol=1e-9, atol=1e-9)
        for frame in (U, V.T):
            eye = torch.eye(len(S), dtype=torch.float64)
            torch.testing.assert_close(frame.T @ frame, eye, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"the product: factors of shapes \(3, 2\) and \(4, 5\) have no product"):
        svd_of_product(torch.zeros(3, 2), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="left factor of q_proj"):
        svd_of_product(torch.full((3, 2), math.nan), torch.zeros(2, 5), "q_proj")
