"""Products of two factors of which one or both are not negative, by multiplicative updates."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def nmf(
    A: Float[Tensor, "m n"], rank: int, *, iterations: int, generator: torch.Generator
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"], list[float]]:
    """X, Y >= 0 with a small || A - X Y ||, for A >= 0 (Lee and Seung, 2001: the error never grows).

    Returns:
        X, Y and the squared error at the start and after every iteration. Raises `ValueError` on negative entries.
    """
    negative = int((A < 0).sum())
    if negative:
        raise ValueError(f"{negative} of {A.numel()} entries are negative, which two factors without negative entries cannot make: take 'snmf' or 'svd'")  # fmt: skip # noqa: E501
    tiny = torch.finfo(A.dtype).tiny ** 0.5
    size = (A.mean() / rank).sqrt()
    X, Y = (_drawn(shape, A, generator) * size for shape in ((A.shape[0], rank), (rank, A.shape[1])))
    errors = [_error(A, X, Y)]
    for _ in range(iterations):
        Y = Y * (X.T @ A) / (X.T @ X @ Y).clamp_min(tiny)
        X = X * (A @ Y.T) / (X @ (Y @ Y.T)).clamp_min(tiny)
        errors.append(_error(A, X, Y))
    return X, Y, errors


def semi_nmf(
    A: Float[Tensor, "m n"], rank: int, *, iterations: int, generator: torch.Generator
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"], list[float]]:
    """X >= 0 and Y of any sign with a small || A - X Y || (Ding, Li and Jordan, 2010: the error never grows).

    Returns as `nmf` does; Y is the least-squares one for X.
    """
    X = _drawn((A.shape[0], rank), A, generator) + 0.2
    Y = _other(A, X)
    errors, tiny = [_error(A, X, Y)], torch.finfo(A.dtype).tiny ** 0.5
    for _ in range(iterations):
        P, Q = A @ Y.T, Y @ Y.T
        up, down = P.clamp_min(0) + X @ (-Q).clamp_min(0), (-P).clamp_min(0) + X @ Q.clamp_min(0)
        X = X * (up / down.clamp_min(tiny)).sqrt()
        Y = _other(A, X)
        errors.append(_error(A, X, Y))
    return X, Y, errors


def _other(A: Tensor, X: Tensor) -> Tensor:
    Y: Tensor = torch.linalg.lstsq(X.double(), A.double(), driver="gelsd" if A.device.type == "cpu" else None).solution
    return Y.to(A.dtype)


def _drawn(shape: tuple[int, int], A: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64).to(A)


def _error(A: Tensor, X: Tensor, Y: Tensor) -> float:
    return float((A - X @ Y).double().square().sum())
