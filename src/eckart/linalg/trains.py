"""Matrices as chains of small cores: matrix product operators, which with two cores are sums of Kronecker products.

Row index o and column index i are split into digits, o = (o_1, ..., o_n) and i = (i_1, ..., i_n), the first the most
significant, and the matrix is a tensor whose k-th index is the pair (o_k, i_k). A core is (r, o_k i_k, r').
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.conjugate import Map, conjugate_gradient, is_plain, normal_map
from eckart.linalg.svd import truncated_svd
from eckart.linalg.weighting import Weighting

Factors = tuple[int, ...]
UNEVEN = 3
"""The largest factor of a side is at most so many times the smallest, or the side is filled up with zeros."""


@dataclass(frozen=True)
class Split:
    """How the sides of a matrix are factored.

    Attributes:
        shape: (out, in).
        out, in_: factors of the two sides, whose products are not less than the sides: the rest is zeros.
    """

    shape: tuple[int, int]
    out: Factors
    in_: Factors

    @property
    def sizes(self) -> Factors:
        """The sizes of the paired indices."""
        return tuple(o * i for o, i in zip(self.out, self.in_, strict=True))

    @property
    def padded(self) -> bool:
        return (math.prod(self.out), math.prod(self.in_)) != self.shape

    def bonds(self, most: int) -> Factors:
        """The widths r_0 = 1, ..., r_n = 1 of the bonds, each at most `most` and at most what is ever needed."""
        left = [math.prod(self.sizes[:k]) for k in range(len(self.sizes) + 1)]
        return tuple(min(most if 0 < k < len(self.sizes) else 1, n, left[-1] // n) for k, n in enumerate(left))

    def numbers(self, most: int) -> int:
        """Numbers in all cores."""
        return sum(a * q * b for q, (a, b) in zip(self.sizes, pairwise(self.bonds(most)), strict=True))

    def tensor(self, M: Float[Tensor, "out in"]) -> Tensor:
        """M as a tensor (o_1 i_1, ..., o_n i_n)."""
        n = len(self.out)
        M = F.pad(M, (0, math.prod(self.in_) - M.shape[1], 0, math.prod(self.out) - M.shape[0]))
        pairs = [k for pair in zip(range(n), range(n, 2 * n), strict=True) for k in pair]
        return M.reshape(*self.out, *self.in_).permute(pairs).reshape(self.sizes)

    def matrix(self, T: Tensor) -> Float[Tensor, "out in"]:
        """The inverse of `tensor`; what lies beyond the sides is cut off."""
        n = len(self.out)
        pairs = [size for pair in zip(self.out, self.in_, strict=True) for size in pair]
        M = T.reshape(pairs).permute(*range(0, 2 * n, 2), *range(1, 2 * n, 2))
        return M.reshape(math.prod(self.out), math.prod(self.in_))[: self.shape[0], : self.shape[1]]


def balanced(n: int, count: int) -> Factors:
    """`count` ascending factors of similar size, of n or of the next number that has such ones."""
    if n < 1:
        raise ValueError(f"a side of {n} has no factors")
    m = n
    while True:
        factors = most_even(m, count, 1)
        if factors is not None and factors[-1] <= UNEVEN * factors[0]:
            return factors
        m += 1


def most_even(n: int, count: int, least: int) -> Factors | None:
    """Of all ways to write n as `count` ascending factors from `least` on, one whose ends are nearest each other."""
    if count == 1:
        return (n,) if n >= least else None
    best: Factors | None = None
    for first in range(least, math.floor(n ** (1 / count) + 1e-9) + 1):
        rest = most_even(n // first, count - 1, first) if n % first == 0 else None
        if rest is not None and (best is None or rest[-1] * best[0] < best[-1] * first):
            best = (first, *rest)
    return best


def train_svd(T: Tensor, bonds: Factors) -> list[Tensor]:
    """Cores (r, q_k, r') of a tensor (q_1, ..., q_n) by successive truncated SVDs (Oseledets, 2011, algorithm 1).

    All but the last have orthonormal columns; the squared error is at most (n - 1) times the best for these bonds.
    """
    cores, rest = [], T.reshape(1, -1)
    for k, size in enumerate(T.shape[:-1]):
        rest = rest.reshape(bonds[k] * size, -1)
        U, S, Vh, *_ = truncated_svd(rest, bonds[k + 1])
        cores.append(U.reshape(bonds[k], size, bonds[k + 1]))
        rest = S[:, None] * Vh
    return [*cores, rest.reshape(bonds[-2], T.shape[-1], 1)]


def joined(cores: list[Tensor]) -> Tensor:
    """The chain multiplied out: (r_first, q..., r_last), the q together in one index."""
    whole = cores[0]
    for core in cores[1:]:
        whole = (whole.flatten(0, 1) @ core.flatten(1)).reshape(whole.shape[0], -1, core.shape[2])
    return whole


def weighted_train(
    W: Float[Tensor, "out in"], split: Split, bonds: Factors, weighting: Weighting, sweeps: int = 2, steps: int = 8
) -> list[Tensor]:
    """Cores for the weighted norm, whose error is never above that of `train_svd`.

    Weights do not separate along the chain in general, so there is no closed form. Of two starts, the SVDs of the
    matrix as it is and those of the matrix scaled by the separable part of the weights (exact where that is all there
    is), the better is refined by alternating least squares: each core in turn is moved by a few conjugate gradients of
    its own problem, the others orthonormal (under equal weights one step is exact).
    """
    T = split.tensor(W)
    plain = train_svd(T, bonds)
    if is_plain(weighting):
        return plain
    scales = _separable(weighting.importance(split.shape).double().to(W.device), split)
    scaled = train_svd(T * joined([s[None, :, None] for s in scales]).reshape(T.shape).to(T), bonds)
    starts = [plain, [core / s.to(core)[None, :, None] for core, s in zip(scaled, scales, strict=True)]]
    best = min(starts, key=lambda cores: weighting.norm2(W - split.matrix(joined(cores))))
    return _swept([core.double() for core in best], W, split, weighting, sweeps, steps)


def _separable(weights: Float[Tensor, "out in"], split: Split) -> list[Tensor]:
    """For each index of the tensor the roots of weights (q_k,) whose product is nearest to these, in logarithm."""
    mean = float(weights.mean())
    logs = (weights / (mean or 1.0)).clamp_min(1e-8).log()
    logs = split.tensor(logs - logs.mean())
    axes = range(logs.dim())
    return [(logs.mean([a for a in axes if a != k]) / 2).exp() for k in axes]


def _swept(
    cores: list[Tensor], W: Float[Tensor, "out in"], split: Split, weighting: Weighting, sweeps: int, steps: int
) -> list[Tensor]:
    """Sweeps along the chain and back; no step raises the weighted error."""
    n, normal = len(cores), normal_map(weighting, *split.shape)
    target = split.tensor(normal(W.double()))
    for k in range(n - 1):
        _pass_on(cores, k)
    for _ in range(sweeps):
        for k in range(n - 1, -1, -1):
            cores[k] = _solved(cores, k, target, split, normal, steps)
            if k > 0:
                Q, R = torch.linalg.qr(cores[k].flatten(1).T)
                cores[k], cores[k - 1] = Q.T.reshape(cores[k].shape), cores[k - 1] @ R.T
        for k in range(n - 1):
            _pass_on(cores, k)
            cores[k + 1] = _solved(cores, k + 1, target, split, normal, steps)
    return cores


def _pass_on(cores: list[Tensor], k: int) -> None:
    """Make core k orthonormal; the next one takes what it was beside that."""
    Q, R = torch.linalg.qr(cores[k].flatten(0, 1))
    cores[k] = Q.reshape(cores[k].shape)
    cores[k + 1] = (R @ cores[k + 1].flatten(1)).reshape(cores[k + 1].shape)


def _solved(cores: list[Tensor], k: int, target: Tensor, split: Split, normal: Map, steps: int) -> Tensor:
    """Core k after a few steps towards its least squares solution."""
    before = joined(cores[:k])[0] if k else cores[0].new_ones(1, 1)
    after = joined(cores[k + 1 :])[..., 0] if k + 1 < len(cores) else cores[0].new_ones(1, 1)
    sizes = (before.shape[0], cores[k].shape[1], after.shape[1])

    def adjoint(T: Tensor) -> Tensor:
        return torch.einsum("pa,pqs,bs->aqb", before, T.reshape(sizes), after)

    def apply(core: Tensor) -> Tensor:
        M = split.matrix(torch.einsum("pa,aqb,bs->pqs", before, core, after))
        return adjoint(split.tensor(normal(M)))

    return conjugate_gradient(apply, adjoint(target), cores[k], steps)
