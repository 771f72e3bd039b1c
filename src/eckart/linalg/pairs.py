"""Closed forms that shrink the dimension between two matrices of a network, from second moments of what flows there.

Three kinds of pair (MoDeGPT, Lin et al., arXiv 2408.09632, section 3): an element-wise map stands between the two
(Nyström), their product is a score of two inputs (CR), or nothing stands between them (SVD). All solves are in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from eckart.linalg.whitening import TriangularRoot, psd_root

JITTER = 1e-10
"""Damping of the Gram matrix of the kept units, relative to its mean diagonal."""


@dataclass(frozen=True)
class Nystrom:
    """The units kept between two matrices, and the second matrix that makes the best of them.

    Attributes:
        index: (k,), ascending.
        right: (out, k), the second matrix.
        error, energy: mean squared norm of the output's error, and of the output.
    """

    index: Int[Tensor, " k"]
    right: Float[Tensor, "out k"]
    error: float
    energy: float


def nystrom(
    W: Float[Tensor, "out n"], C: Float[Tensor, "n n"], width: int, ridge: float = 1e-2, name: str = "the matrix"
) -> Nystrom:
    """The `width` units of largest ridge leverage, and argmin_V E || W a - V a_J ||² = W C[:, J] C[J, J]⁻¹.

    A singular C[J, J] is damped by `JITTER`; where that is not enough, by more, with a `Damped` warning.

    Args:
        W: the second matrix.
        C: E[a aᵀ] of its input.
        ridge: of the leverage scores diag(C (C + λ I)⁻¹), λ relative to the mean of C's diagonal.
        name: what W is, for messages.

    Raises:
        ValueError: the width is impossible, or the kept units are never active.
    """
    n = C.shape[0]
    if not 1 <= width <= n:
        raise ValueError(f"{name}: cannot keep {width} of {n} units")
    W, C = W.double(), C.double()
    index = leverage(C, ridge, name).sort(descending=True, stable=True).indices[:width].sort().values
    lost = torch.ones(n, dtype=torch.bool, device=C.device).index_fill(0, index, False)
    # as a correction of the kept columns, which damping then shrinks instead of the columns themselves
    right = W[:, index] + _solve(C[index][:, index], W[:, lost] @ C[lost][:, index], name)
    return Nystrom(index, right, restricted_error(W, right, index, C), float(((W @ C) * W).sum()))


def leverage(C: Float[Tensor, "n n"], ridge: float, name: str) -> Float[Tensor, " n"]:
    """diag(C (C + λ I)⁻¹): how much of each unit the others do not say already."""
    root = psd_root(C, ridge, name=f"the input of {name}")
    if not isinstance(root, TriangularRoot):
        raise ValueError(f"the input of {name} is zero on all calibration data: calibrate on other data, or leave the layer as it is")  # fmt: skip # noqa: E501
    return (C * torch.cholesky_inverse(root.S)).sum(1)


def _solve(G: Float[Tensor, "k k"], B: Float[Tensor, "out k"], name: str) -> Float[Tensor, "out k"]:
    """B G⁻¹."""
    root = psd_root(G, JITTER, name=f"the kept inputs of {name}")
    if not isinstance(root, TriangularRoot):
        raise ValueError(f"the kept inputs of {name} are zero on all calibration data: calibrate on other data")
    return torch.cholesky_solve(B.T, root.S).T


def restricted_error(
    W: Float[Tensor, "out n"], right: Float[Tensor, "out k"], index: Int[Tensor, " k"], C: Float[Tensor, "n n"]
) -> float:
    """E || W a - right a_J ||²."""
    E = W.double().clone()
    E[:, index] -= right.double()
    return max(0.0, float(((E @ C.double()) * E).sum()))


@dataclass(frozen=True)
class Coordinates:
    """The coordinates kept in every head.

    Attributes:
        index: (groups, k), ascending in each row.
        error, energy: sums of the dropped scores and of all.
    """

    index: Int[Tensor, "groups k"]
    error: float
    energy: float


def strongest_coordinates(
    scores: Float[Tensor, "groups n"], pairs: Sequence[tuple[int, int]], width: int, name: str = "the scores"
) -> Coordinates:
    """The `width` coordinates of each group with the largest sum of scores, taking both of a pair or none.

    Args:
        scores: non-negative and additive, such as E[q_i²] E[k_i²] summed over the query heads of a group.
        pairs: coordinates that must stay together; the others stand alone.

    Raises:
        ValueError: no such set has this width (none, or odd where all are paired).
    """
    groups, n = scores.shape
    scores = scores.double()
    both = torch.tensor(pairs, dtype=torch.long, device=scores.device).reshape(-1, 2)
    alone = torch.ones(n, dtype=torch.bool, device=scores.device)
    alone[both.flatten()] = False
    singles = alone.nonzero()[:, 0]
    fewest, most = max(0, -(-(width - len(singles)) // 2)), min(len(both), width // 2)
    if not 1 <= width <= n or fewest > most:
        raise ValueError(f"{name}: cannot keep {width} of {n} coordinates, {2 * len(both)} of them in pairs")
    of_pairs, pair_order = scores[:, both].sum(-1).sort(dim=1, descending=True, stable=True)
    of_singles, single_order = scores[:, singles].sort(dim=1, descending=True, stable=True)
    counts = torch.arange(fewest, most + 1, device=scores.device)
    total = _prefix(of_pairs)[:, counts] + _prefix(of_singles)[:, width - 2 * counts]
    index = torch.empty(groups, width, dtype=torch.long, device=scores.device)
    for g, count in enumerate(counts[total.argmax(1)].tolist()):
        chosen = [both[pair_order[g, :count]].flatten(), singles[single_order[g, : width - 2 * count]]]
        index[g] = torch.cat(chosen).sort().values
    energy = float(scores.sum())
    return Coordinates(index, max(0.0, energy - float(scores.gather(1, index).sum())), energy)


def _prefix(values: Float[Tensor, "groups n"]) -> Float[Tensor, "groups m"]:
    """Sums of the first 0, 1, ... n values."""
    return F.pad(values.cumsum(1), (1, 0))


@dataclass(frozen=True)
class Product:
    """left (m, k) @ right (k, n), the best of that rank, and the squared singular values it was cut from."""

    left: Float[Tensor, "m k"]
    right: Float[Tensor, "k n"]
    squares: Float[Tensor, " h"]


def truncated_product(
    left: Float[Tensor, "m h"], right: Float[Tensor, "h n"], C: Float[Tensor, "n n"], width: int, name: str = "the pair"
) -> Product:
    """argmin over rank `width` of || (left right - L R) C^{1/2} ||, without forming the product or a root of C.

    With right C rightᵀ = S Sᵀ (h, h) and left S = U Σ Zᵀ, it is L = left S Z_k, R = Z_kᵀ S⁺ right, whose discarded Σ²
    are the squared error. Two SVDs through C^{1/2} (n, n), as in the paper, give the same.

    Raises `ValueError` where the width is impossible.
    """
    h = right.shape[0]
    if not 1 <= width <= h:
        raise ValueError(f"{name}: cannot keep {width} of {h} coordinates")
    left, right = left.double(), right.double()
    root = psd_root(right @ C.double() @ right.T, 0.0, kind="eigen", name=name)
    LS = root.times(left)
    values, Z = torch.linalg.eigh(LS.T @ LS)
    values, Z = values.flip(0).clamp_min(0), Z.flip(1)
    kept = min(width, len(values))  # fewer where some coordinates say nothing: the others are stored as zeros
    L, R = LS @ Z[:, :kept], root.over(Z[:, :kept].T) @ right
    return Product(F.pad(L, (0, width - kept)), F.pad(R, (0, 0, 0, width - kept)), F.pad(values, (0, h - len(values))))


def product_error(
    left: Float[Tensor, "m h"], right: Float[Tensor, "h n"], L: Float[Tensor, "m k"], R: Float[Tensor, "k n"],
    C: Float[Tensor, "n n"],
) -> float:  # fmt: skip
    """|| (left right - L R) C^{1/2} ||², by way of matrices that are (h + k) wide."""
    P, Q = torch.cat([left, -L], 1).double(), torch.cat([right, R]).double()
    return max(0.0, float(((P.T @ P) * (Q @ C.double() @ Q.T)).sum()))
