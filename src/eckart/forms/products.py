"""A product with a sparse matrix, by rows, where that is faster than forming it."""

from __future__ import annotations

import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eckart.forms.base import Shape


def csr_pays(x: Float[Tensor, "*batch in"], shape: Shape, count: int) -> bool:
    """Whether `csr_product` can be used and is the faster way."""
    tokens = x.numel() // max(1, shape[1])
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or not tokens or not count:
        return False
    return count <= 0.1 * shape[0] * shape[1]


def csr_product(
    x: Float[Tensor, "*batch in"], starts: Int[Tensor, " out_and_1"], columns: Int[Tensor, " nnz"],
    values: Float[Tensor, " nnz"], shape: Shape,
) -> Float[Tensor, "*batch out"]:  # fmt: skip
    """x Wᵀ with W by compressed rows, whose indices have been checked. Not differentiable."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        W = torch.sparse_csr_tensor(starts, columns, values.detach(), shape, check_invariants=False)
    return (W @ x.detach().reshape(-1, shape[1]).T).T.reshape(*x.shape[:-1], shape[0])
