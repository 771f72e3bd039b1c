"""Convex functions K with what a Lion-K optimiser needs: their subgradients, conjugates and feasible sets.

A Lion-K optimiser with weight decay lambda minimises f(x) + K*(lambda x) / lambda (Chen, Liu, Liang and Liu, ICLR 2024,
arXiv 2310.05898, section 3 and table 2), so K* says what it is that is solved: an indicator is a constraint.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eckart.linalg.svd import truncated_svd

_OUTSIDE = 1e-5
"""What an indicator forgives, relative to the bound: rounding."""


@dataclass(frozen=True)
class Convex(ABC):
    """An even convex function of a whole tensor with zero among its subgradients at zero."""

    elementwise: ClassVar[bool] = False
    """Whether it is a sum over the entries."""

    @abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """K(x), a scalar."""

    @abstractmethod
    def subgradient(self, x: Tensor) -> Tensor:
        """One element of K's subdifferential; zero at zero."""

    @abstractmethod
    def conjugate(self, y: Tensor) -> Tensor:
        """K*(y) = sup <x, y> - K(x), a scalar; infinite where y is not feasible."""


def _indicator(y: Tensor, norm: Tensor, bound: float = 1.0) -> Tensor:
    """Zero where the norm is within the bound, else infinity."""
    return torch.where(norm <= bound * (1 + _OUTSIDE), 0.0, math.inf).to(y.dtype)


def _largest(y: Tensor) -> Tensor:
    return y.abs().amax() if y.numel() else y.new_zeros(())


@dataclass(frozen=True)
class L1(Convex):
    """||x||_1, whose subgradient is the sign: a bound on every entry. This is Lion."""

    elementwise: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        return x.abs().sum()

    def subgradient(self, x: Tensor) -> Tensor:
        return x.sign()

    def conjugate(self, y: Tensor) -> Tensor:
        return _indicator(y, _largest(y))


@dataclass(frozen=True)
class PNorm(Convex):
    """||x||_p over the whole tensor: a bound on the dual norm; p = 2 is normalised momentum in a ball.

    Args:
        p: above 1 (1 itself is `L1`).
    """

    p: float = 2.0

    def __post_init__(self) -> None:
        if not self.p > 1 or math.isinf(self.p):
            raise ValueError(f"the p of a p-norm is finite and above 1 here, not {self.p}; for p = 1 use L1()")

    def value(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, self.p)

    def subgradient(self, x: Tensor) -> Tensor:
        norm = self.value(x)
        return x.sign() * (x.abs() / torch.where(norm > 0, norm, 1.0)) ** (self.p - 1)

    def conjugate(self, y: Tensor) -> Tensor:
        return _indicator(y, torch.linalg.vector_norm(y, self.p / (self.p - 1)))


@dataclass(frozen=True)
class DeadZone(Convex):
    """sum max(|x| - e, 0): an l1 penalty e ||y||_1 besides the bound, and thus sparse solutions.

    Args:
        e: half the width of the zone, not negative.
    """

    elementwise: ClassVar[bool] = True

    e: float = 0.1

    def __post_init__(self) -> None:
        if not self.e >= 0:
            raise ValueError(f"a dead zone's width is not negative; it was given as {self.e}")

    def value(self, x: Tensor) -> Tensor:
        return (x.abs() - self.e).clamp(min=0).sum()

    def subgradient(self, x: Tensor) -> Tensor:
        return x.sign() * (x.abs() > self.e)

    def conjugate(self, y: Tensor) -> Tensor:
        return self.e * y.abs().sum() + _indicator(y, _largest(y))


@dataclass(frozen=True)
class TopK(Convex):
    """The sum of the k largest |x|: bounds on the 1-norm (k) and on every entry (1).

    Args:
        k: at least 1, and at most the number of entries.
    """

    k: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"the k of top-k is a whole number of at least 1, not {self.k!r}")

    def value(self, x: Tensor) -> Tensor:
        return x.abs().flatten().topk(self._fitting(x)).values.sum()

    def subgradient(self, x: Tensor) -> Tensor:
        top = x.abs().flatten().topk(self._fitting(x)).indices
        signs = x.sign().flatten()
        return torch.zeros_like(signs).index_copy_(0, top, signs[top]).view(x.shape)

    def conjugate(self, y: Tensor) -> Tensor:
        return _indicator(y, y.abs().sum(), self.k) + _indicator(y, _largest(y))

    def _fitting(self, x: Tensor) -> int:
        if self.k > x.numel():
            raise ValueError(f"top-k with k = {self.k} on a tensor of shape {tuple(x.shape)}, which has only {x.numel()} entries: lower k, or give such parameters a group of their own")  # fmt: skip # noqa: E501
        return self.k


@dataclass(frozen=True)
class Huber(Convex):
    """x^2 / 2e up to e, |x| - e/2 beyond: the clipped momentum; an l2 penalty besides the bound.

    Args:
        e: above 0; towards 0 this is Lion.
    """

    elementwise: ClassVar[bool] = True

    e: float = 0.1

    def __post_init__(self) -> None:
        if not self.e > 0:
            raise ValueError(f"Huber's e is above 0, not {self.e}")

    def value(self, x: Tensor) -> Tensor:
        size = x.abs()
        return torch.where(size <= self.e, size.square() / (2 * self.e), size - self.e / 2).sum()

    def subgradient(self, x: Tensor) -> Tensor:
        return (x / self.e).clamp(-1, 1)

    def conjugate(self, y: Tensor) -> Tensor:
        return self.e / 2 * y.square().sum() + _indicator(y, _largest(y))


@dataclass(frozen=True)
class Relativistic(Convex):
    """sum sqrt(1 + x^2) - 1: a smooth sign."""

    elementwise: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        return ((1 + x.square()).sqrt() - 1).sum()

    def subgradient(self, x: Tensor) -> Tensor:
        return x * (1 + x.square()).rsqrt()

    def conjugate(self, y: Tensor) -> Tensor:
        return (1 - (1 - y.square()).clamp(min=0).sqrt()).sum() + _indicator(y, _largest(y))


@dataclass(frozen=True)
class Rows(Convex):
    """||x||_{2,1}: the sum of the 2-norms along the last dimension; a ball for every row."""

    def value(self, x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=-1).sum()

    def subgradient(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.where(norms > 0, norms, 1.0)

    def conjugate(self, y: Tensor) -> Tensor:
        return _indicator(y, _largest(torch.linalg.vector_norm(y, dim=-1)))


@dataclass(frozen=True)
class Quadratic(Convex):
    """||x||^2 / 2: plain momentum with an l2 penalty."""

    elementwise: ClassVar[bool] = True

    def value(self, x: Tensor) -> Tensor:
        return x.square().sum() / 2

    def subgradient(self, x: Tensor) -> Tensor:
        return x

    def conjugate(self, y: Tensor) -> Tensor:
        return y.square().sum() / 2


@dataclass(frozen=True)
class Nuclear(Convex):
    """The nuclear norm of a matrix, whose subgradient is the polar factor U Vᵀ: a bound on the spectral norm.

    Tensors with one mode count as a matrix with one column, those with more are unfolded along their first mode.
    """

    def value(self, x: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(_matrix(x), "nuc")

    def subgradient(self, x: Tensor) -> Tensor:
        U, S, Vh, *_ = truncated_svd(_matrix(x), route="exact")
        kept = torch.finfo(S.dtype).eps * max(_matrix(x).shape) * S[:1] < S  # zero singular values have no direction
        return ((U * kept) @ Vh).view(x.shape).to(x.dtype)

    def conjugate(self, y: Tensor) -> Tensor:
        return _indicator(y, torch.linalg.matrix_norm(_matrix(y), 2))


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, 1) if x.dim() < 2 else x.flatten(1)
