"""Square roots of positive semi-definite weights: how a metric acts on one side of a matrix.

A weight C (n, n) on one side of a matrix enters every solver through some S with C = S Sᵀ. Solvers need two products
only, `M S` and `M S⁻¹`, so a root may be an identity, a diagonal or a dense factor without anybody asking which.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.remarks import remark


class Root(Protocol):
    """S (n, k) with C = S Sᵀ (n, n)."""

    def times(self, M: Float[Tensor, "m n"]) -> Float[Tensor, "m k"]:
        """M S."""

    def over(self, M: Float[Tensor, "m k"]) -> Float[Tensor, "m n"]:
        """M S⁻¹ (the pseudo-inverse where S is singular)."""

    def gram(self, n: int) -> Float[Tensor, "n n"]:
        """C, dense, in float64."""


class IdentityRoot:
    """C = I: this side is not weighted."""

    def times(self, M: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return M

    def over(self, M: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return M

    def gram(self, n: int) -> Float[Tensor, "n n"]:
        return torch.eye(n, dtype=torch.float64)


class DiagonalRoot:
    """S = diag(d): every column has a weight of its own. d (n,) must be positive."""

    def __init__(self, d: Float[Tensor, " n"]):
        if not bool((d > 0).all()):
            raise ValueError("a diagonal weight needs positive entries; damp it first (see `damped_diagonal`)")
        self.d = d

    def times(self, M: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return M * self.d.to(M)

    def over(self, M: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return M / self.d.to(M)

    def gram(self, n: int) -> Float[Tensor, "n n"]:
        return torch.diag(self.d.double() ** 2)


class TriangularRoot:
    """S is a lower triangular Cholesky factor (n, n)."""

    def __init__(self, S: Float[Tensor, "n n"]):
        self.S = S

    def times(self, M: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return M @ self.S.to(M)

    def over(self, M: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return torch.linalg.solve_triangular(self.S, M.to(self.S), upper=False, left=False).to(M)

    def gram(self, n: int) -> Float[Tensor, "n n"]:
        return self.S.double() @ self.S.double().T


class EigenRoot:
    """S = Q diag(sqrt(values)), with Q (n, k) orthonormal: exact on a singular C, where k is its rank."""

    def __init__(self, Q: Float[Tensor, "n k"], values: Float[Tensor, " k"]):
        self.Q, self.scale = Q, values.sqrt()

    def times(self, M: Float[Tensor, "m n"]) -> Float[Tensor, "m k"]:
        return (M @ self.Q.to(M)) * self.scale.to(M)

    def over(self, M: Float[Tensor, "m k"]) -> Float[Tensor, "m n"]:
        return (M / self.scale.to(M)) @ self.Q.to(M).T

    def gram(self, n: int) -> Float[Tensor, "n n"]:
        S = self.Q.double() * self.scale.double()
        return S @ S.T


def gram_diagonal(root: Root, n: int) -> Float[Tensor, " n"]:
    """The diagonal of C in float64, without the whole of it where the root is one of these."""
    if isinstance(root, IdentityRoot):
        return torch.ones(n, dtype=torch.float64)
    if isinstance(root, DiagonalRoot):
        return root.d.double().square()
    if isinstance(root, TriangularRoot):
        return root.S.double().square().sum(1)
    if isinstance(root, EigenRoot):
        return (root.Q.double() * root.scale.double()).square().sum(1)
    return root.gram(n).diagonal()


class Damped(UserWarning):
    """A weight needed more damping than was asked for."""


def damped_diagonal(d: Float[Tensor, " n"], damping: float, name: str = "") -> Float[Tensor, " n"]:
    """max(d, damping * mean(d)): dead entries get a small weight instead of none. All-zero input gives ones."""
    check_finite(d, f"the diagonal weight{' of ' + name if name else ''}")
    d = d.double()
    mean = float(d.mean()) if d.numel() else 0.0
    return d.clamp_min(damping * mean) if mean > 0 else torch.ones_like(d)


def psd_root(
    C: Float[Tensor, "n n"], damping: float = 1e-6, kind: Literal["cholesky", "eigen"] = "cholesky", name: str = ""
) -> Root:
    """The root of C + damping * mean(diag C) * I, in float64.

    Cholesky retries with ten times the damping while C is numerically indefinite, and warns with the damping that
    worked (`Damped`). The eigen route drops the null space instead and never needs more.

    Args:
        C: (n, n), symmetric positive semi-definite up to rounding.
        damping: relative to the mean of the diagonal; 0 is allowed.
        kind: `cholesky` (fast) or `eigen` (exact on singular C).
        name: what C belongs to, for messages.
    """
    check_finite(C, f"the covariance{' of ' + name if name else ''}")
    C = C.double()
    n = C.shape[0]
    scale = float(C.diagonal().mean()) if n else 0.0
    if scale <= 0.0:
        return IdentityRoot()
    if kind == "eigen":
        values, Q = torch.linalg.eigh(_shifted(C, damping * scale))
        keep = values > values[-1] * n * torch.finfo(torch.float64).eps
        return EigenRoot(Q[:, keep], values[keep])
    tried = damping
    while tried < 1.0:
        S, info = _cholesky(C, tried * scale)
        if info == 0:
            if tried > damping:
                text = f"the covariance{' of ' + name if name else ''} is rank-deficient"
                remark(f"{text}: damped by {tried:.0e} of its mean diagonal", Damped)
            return TriangularRoot(S)
        del S  # before the next one is made
        tried = max(tried * 10, 1e-12)
    raise ValueError(f"the covariance{' of ' + name if name else ''} is not positive semi-definite (even damped by 1)")


def _cholesky(C: Float[Tensor, "n n"], shift: float) -> tuple[Float[Tensor, "n n"], int]:
    """The lower Cholesky factor of C + shift * I, and 0 where there is one."""
    diagonal = C.diagonal().clone()
    C.diagonal().add_(shift)  # and taken back: wide ones are a large part of all memory, and a copy would double them
    try:
        S, info = torch.linalg.cholesky_ex(C)
    finally:
        C.diagonal().copy_(diagonal)
    return S, int(info)


def _shifted(C: Float[Tensor, "n n"], by: float) -> Float[Tensor, "n n"]:
    """C + by * I."""
    shifted = C.clone()
    shifted.diagonal().add_(by)
    return shifted


def check_finite(x: Tensor, what: str) -> None:
    """Raise `ValueError` naming `what` if x holds NaN or infinity."""
    if not all_finite(x):
        raise ValueError(f"{what} holds NaN or infinity")


def all_finite(x: Tensor) -> bool:
    """Whether x holds neither NaN nor infinity: one pass, nothing in memory, a tenth of the time of `isfinite`."""
    return x.numel() == 0 or all(math.isfinite(float(bound)) for bound in x.aminmax())
