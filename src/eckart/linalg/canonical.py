"""Tensors as sums of rank-one ones (CP, or canonical polyadic), by alternating least squares."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SETTLED = 1e-12


def cp_als(
    T: Float[Tensor, "*sides"], rank: int, *, iterations: int = 200, generator: torch.Generator
) -> tuple[list[Float[Tensor, "side r"]], float]:
    """Factors, one for each side, with T[i, j, ...] ~ sum_r A[i, r] B[j, r] ..., and the squared error; in float64.

    Each factor in turn is the least-squares one for the others (Carroll and Chang, 1970), from the leading singular
    vectors of the sides, and random numbers beyond these. The error never grows but may settle above the best one.
    Columns of all factors have equal norms.
    """
    if rank < 1:
        raise ValueError(f"a tensor of shape {tuple(T.shape)} is no sum of {rank} rank-one tensors: the rank is positive")  # fmt: skip # noqa: E501
    T = T.double()
    factors = [_start(T.movedim(n, 0).flatten(1), rank, generator) for n in range(T.dim())]
    energy, error = float(T.square().sum()), float("inf")
    for _ in range(iterations):
        for n in range(T.dim()):
            others = _products([f for m, f in enumerate(factors) if m != n])
            factors[n] = torch.linalg.lstsq(others, T.movedim(n, 0).flatten(1).T, driver=_driver(T)).solution.T
            factors = _balanced(factors)
        before, error = error, float((cp_dense(factors) - T).square().sum())
        if before - error <= SETTLED * energy:
            break
    return factors, error


def cp_dense(factors: list[Float[Tensor, "side r"]]) -> Float[Tensor, "*sides"]:
    """The tensor itself."""
    return _products(factors).sum(1).view([len(f) for f in factors])


def _products(factors: list[Tensor]) -> Float[Tensor, "entries r"]:
    """The entries of every rank-one tensor."""
    found = factors[0]
    for factor in factors[1:]:
        found = (found[:, None] * factor).flatten(0, 1)
    return found


def _start(M: Float[Tensor, "side rest"], rank: int, generator: torch.Generator) -> Float[Tensor, "side r"]:
    start = torch.randn(len(M), rank, dtype=torch.float64, generator=generator).to(M)
    U = torch.linalg.svd(M, full_matrices=False).U[:, :rank]
    start[:, : U.shape[1]] = U
    return start


def _balanced(factors: list[Tensor]) -> list[Tensor]:
    """The same tensor, each column of its factors as large as those beside it."""
    norms = torch.stack([f.norm(dim=0) for f in factors])
    mean = norms.prod(0) ** (1 / len(factors))
    return [torch.where(n > 0, f * (mean / n.clamp_min(torch.finfo(f.dtype).tiny)), f) for f, n in zip(factors, norms, strict=True)]  # fmt: skip # noqa: E501


def _driver(T: Tensor) -> str | None:
    return "gelsd" if T.device.type == "cpu" else None
