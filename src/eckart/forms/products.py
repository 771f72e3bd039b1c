"""Products with sparse matrices, by rows, where that is faster than forming them."""

from __future__ import annotations

import itertools
import warnings

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eckart.forms.base import Shape

TASK = 1 << 20
"""Products that a task of `group_product` holds at a time."""

FEW = 0.5
"""Products, as a share of the entries of the matrix, up to which `group_product` beats forming it."""


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


def group_pays(x: Float[Tensor, "*batch in"], shape: Shape, numbers: int) -> bool:
    """Whether `group_product` is the faster way, which it is for few rows."""
    tokens = x.numel() // max(1, shape[1])
    return 0 < tokens * numbers <= FEW * shape[0] * shape[1]


def group_product(
    x: Float[Tensor, "*batch in"], starts: Int[Tensor, " out_and_1"], index: Int[Tensor, " places"],
    values: Float[Tensor, "places group"], shape: Shape, tasks: int | None = None,
) -> Float[Tensor, "*batch out"]:  # fmt: skip
    """x Wᵀ with W in groups of columns by compressed rows, whose indices have been checked.

    The kept groups of all rows are cut into tasks of equal size, give or take one group, so that no row of many groups
    holds the others up; what two tasks find of one row is added (GQSA, arXiv 2412.17560).

    Args:
        tasks: how many; None takes as many as hold `TASK` products each.
    """
    out, in_ = shape
    places, group = values.shape
    rows = x.reshape(-1, in_)
    padded = torch.nn.functional.pad(rows, (0, -in_ % group)).view(len(rows), -1, group)
    line = torch.arange(out, device=x.device).repeat_interleave(starts.diff(), output_size=places)
    y = rows.new_zeros(len(rows), out)
    for start, end in itertools.pairwise(task_bounds(places, tasks or -(-len(rows) * values.numel() // TASK))):
        partial = (padded[:, index[start:end]] * values[start:end]).sum(-1)
        y = y.index_add(1, line[start:end], partial)
    return y.view(*x.shape[:-1], out)


def task_bounds(places: int, tasks: int) -> list[int]:
    """Where each of so many equal runs of places begins, and where the last one ends."""
    return [places * i // max(1, tasks) for i in range(max(1, tasks) + 1)]
