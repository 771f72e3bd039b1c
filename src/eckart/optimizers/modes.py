"""Products of a tensor with one factor for some of its modes: how gradients go into a subspace and come back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Factors = Mapping[int, Tensor]
"""Mode -> its factor: (side, r) with orthonormal columns, or (r,) whole numbers that select from that side."""


def contract(A: Tensor, factors: Factors) -> Tensor:
    """A, with every mode that has a factor F replaced by Fᵀ's coordinates: for a matrix, F_0ᵀ A F_1."""
    for mode, F in factors.items():
        A = A.index_select(mode, F) if not F.is_floating_point() else _times(A, mode, F)
    return A


def expand(N: Tensor, factors: Factors, shape: tuple[int, ...]) -> Tensor:
    """The transpose of `contract`, of the full shape: for a matrix, F_0 N F_1ᵀ."""
    for mode, F in factors.items():
        if F.is_floating_point():
            N = _times(N, mode, F.mT)
        else:
            wide = N.new_zeros([*N.shape[:mode], shape[mode], *N.shape[mode + 1 :]])
            N = wide.index_copy_(mode, F.long(), N)
    return N


def added(A: Tensor, N: Tensor, factors: Factors, alpha: float, out: Tensor | None = None) -> Tensor:
    """A + alpha * expand(N), which may be written into A itself; with one wide factor of a matrix in a single pass."""
    mode, F = next(iter(factors.items()), (0, N))
    if len(factors) == 1 and A.dim() == 2 and F.is_floating_point() and A.dtype == F.dtype == N.dtype:
        return torch.addmm(A, *((N, F.mT) if mode == 1 else (F, N)), alpha=alpha, out=out)
    return torch.add(A, expand(N, factors, tuple(A.shape)), alpha=alpha, out=out)


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """(r_old, r_new): old coordinates times this are new ones. Of two selections it holds zeros and ones only."""
    if old.is_floating_point():
        return old.mT @ new
    return (old[:, None] == new[None, :]).to(torch.float32)


def _times(A: Tensor, mode: int, F: Tensor) -> Tensor:
    """A's mode of size s times F (s, t)."""
    if mode == A.dim() - 1:
        return A @ F
    if mode == A.dim() - 2:
        return F.mT @ A
    return (A.movedim(mode, -1) @ F).movedim(-1, mode).contiguous()
