"""Several matrices made one: a mean by shares, in the leading directions that they span together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def weighted_mean(stack: Float[Tensor, "n out in"], shares: Float[Tensor, " n"]) -> Float[Tensor, "out in"]:
    """The mean by shares, which need not sum to one; the plain mean where all are zero. In float64."""
    shares = shares.double() if bool(shares.any()) else torch.ones_like(shares, dtype=torch.float64)
    total = torch.zeros(stack.shape[1:], dtype=torch.float64, device=stack.device)
    for share, M in zip((shares / shares.sum()).tolist(), stack, strict=True):
        total += share * M.double()
    return total


def union_basis(
    stack: Float[Tensor, "n out in"], rank: int, grams: Sequence[Float[Tensor, "in in"]] | None = None
) -> Float[Tensor, "out r"]:
    """The leading left singular vectors of [W_1 S_1 ... W_n S_n], S_i S_iᵀ being the grams; of [W_1 ... W_n] without.

    They are eigenvectors of the sum of W_i S_i S_iᵀ W_iᵀ, so that no gram is factored and any may be singular.
    """
    n, out, _ = stack.shape
    if not 1 <= rank <= out:
        raise ValueError(f"matrices of {out} rows have from 1 to {out} directions; {rank} were asked for")
    total = torch.zeros(out, out, dtype=torch.float64, device=stack.device)
    for i in range(n):
        W = stack[i].double()
        total += (W if grams is None else W @ grams[i].to(W)) @ W.T
    return torch.linalg.eigh((total + total.T) / 2).eigenvectors[:, -rank:].flip(1)


def matched_rows(rows: Float[Tensor, "n d"], like: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
    """The order of rows in which they are most like those of another matrix: a matching of greatest inner product."""
    products = like.float() @ rows.float().T
    best = products.argmax(1)
    if len(best.unique()) < len(best):  # else each row's own favourite is a matching, and none is better
        best = torch.from_numpy(linear_sum_assignment(products.cpu().numpy(), maximize=True)[1]).to(rows.device)
    return best
