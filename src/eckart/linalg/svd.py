"""Truncated singular value decomposition by the cheapest route that is accurate enough.

Three routes. "gram": eigenvectors of A^T A on the smaller side; about a third of a full SVD's time and optimal as long
as the values kept stand clear of the square root of rounding, which is checked. "randomized": block power iteration
from a Gaussian start (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4), run until the energy it still
gains is negligible; for ranks far below the matrix's sides. "exact": LAPACK's divide and conquer SVD.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from eckart.linalg.power import orthonormalise, power_step, random_basis

Purpose = Literal["factors", "spectrum"]
Route = Literal["auto", "gram", "exact", "randomized"]
Triple = tuple[Tensor, Tensor, Tensor]

# The smallest kept singular value, relative to the largest, that a Gram matrix in this precision resolves: there its
# relative error is about 5e-4 in float32 and 1e-6 in float64, and it grows with the inverse square below.
_GRAM_FLOOR = {torch.float32: 1e-2, torch.float64: 1e-5}
# Below this share of ||A||^2 the difference ||A||^2 - sum S^2 has lost too many digits to be the squared error.
_IDENTITY_FLOOR = {torch.float32: 1e-2, torch.float64: 1e-9}
# 2^-exponent must itself be a finite number of the type.
_LEAST_EXPONENT = {torch.float32: -120, torch.float64: -1000}
# The excess over the optimal error at which power iteration stops; a third of the 5e-4 it may have, because the
# extrapolation that estimates it is optimistic.
_RANDOMIZED_EXCESS = 1.5e-4
_RANDOMIZED_STEPS = 12


class TruncatedSVD(NamedTuple):
    """A ~ U diag(S) Vh.

    Attributes:
        U: (m, r), orthonormal columns, each with its entry of largest magnitude positive.
        S: (r,), descending, not negative.
        Vh: (r, n), orthonormal rows.
        error: ||A - U diag(S) Vh||_F, in A's units: sqrt(||A||^2 - sum S^2), which is exact for these factors, where
            that difference keeps its digits, and the measured residual where it does not.
        route: "gram", "exact" or "randomized": what was used in the end.
    """

    U: Float[Tensor, "m r"]
    S: Float[Tensor, " r"]
    Vh: Float[Tensor, "r n"]
    error: float
    route: str


@torch.no_grad()
def truncated_svd(
    A: Float[Tensor, "m n"],
    rank: int | None = None,
    *,
    purpose: Purpose = "factors",
    route: Route = "auto",
    seed: int = 0,
) -> TruncatedSVD:
    """The best approximation of a matrix at a given rank (Eckart and Young 1936), within 1.0005 of the optimal error.

    Args:
        A: (m, n), real floating point, finite; may be empty. Worked on in float64 if it is float64, else in float32,
            and in float64 where the spectrum asks for it. No gradient flows.
        rank: r from 0 to min(m, n); all of min(m, n) when None.
        purpose: "factors" when only the approximation counts; "spectrum" when the singular values decide something (an
            allocation): then they are at least as accurate as LAPACK's in A's precision.
        route: "auto", or one route by name. "randomized" falls back to "gram" when it cannot show that it converged.
        seed: of the randomised route's start. The other routes are deterministic.

    Returns:
        U, S, Vh in float64 for float64 input and in float32 otherwise, the error and the route. The factors are
        orthonormal for a rank-deficient A too: vectors of zero singular values are arbitrary completions.

    Raises:
        TypeError: A is not real floating point.
        ValueError: A is not a matrix or not finite; the rank, purpose or route is impossible.
    """
    A, exponent = _prepared(A)
    m, n = A.shape
    rank = _checked_rank(rank, m, n)
    if purpose not in ("factors", "spectrum"):
        raise ValueError(f"The purpose of a truncated SVD is 'factors' or 'spectrum', not {purpose!r}.")
    if route not in ("auto", "gram", "exact", "randomized"):
        raise ValueError(f"The route of a truncated SVD is 'auto', 'gram', 'exact' or 'randomized', not {route!r}.")
    if route == "randomized" and purpose == "spectrum":
        raise ValueError(
            "Randomised singular values are too inaccurate to decide an allocation: with purpose='spectrum' use the "
            "route 'auto', 'gram' or 'exact'."
        )
    if rank == 0:
        factors, used = (A.new_zeros(m, 0), A.new_zeros(0), A.new_zeros(n, 0)), "exact"
    elif m >= n:
        factors, used = _decompose(A, rank, purpose, route, seed)
    else:
        (V, S, U), used = _decompose(A.mT, rank, purpose, route, seed)
        factors = U, S, V
    U, S, V = (factor.to(A.dtype) for factor in factors)
    if rank > 0:
        peaks = U.gather(0, U.abs().argmax(0, keepdim=True))
        signs = torch.where(peaks < 0, -1.0, 1.0).to(A.dtype)
        U, V = U * signs, V * signs
    error = math.ldexp(_error(A, U, S, V), exponent)
    return TruncatedSVD(U, S * 2.0**exponent, V.mT.contiguous(), error, used)


@torch.no_grad()
def singular_values(A: Float[Tensor, "m n"]) -> Float64[Tensor, " k"]:
    """All min(m, n) singular values of A, descending, in float64.

    From the eigenvalues of the Gram matrix in float64. For float32 (or narrower) input the error is below the rounding
    of the input itself: relative 1e-5 for values above 1e-5 of the largest, absolute 1e-7 of the largest below. For
    float64 input that reaches below 1e-5 of its largest value, LAPACK's SVD is used instead.

    Raises TypeError and ValueError as `truncated_svd` does.
    """
    A, exponent = _prepared(A)
    if A.numel() == 0:
        return torch.zeros(0, dtype=torch.float64, device=A.device)
    tall = (A if A.shape[0] >= A.shape[1] else A.mT).double()
    try:
        S = torch.linalg.eigvalsh(_lower_gram(tall)).flip(0).clamp(min=0).sqrt()
    except torch.linalg.LinAlgError:
        S = None
    if S is None or (A.dtype == torch.float64 and S[-1] < _GRAM_FLOOR[torch.float64] * S[0]):
        S = torch.linalg.svdvals(tall)
    return S * 2.0**exponent


def _prepared(A: Tensor) -> tuple[Tensor, int]:
    """A in float32 or float64, scaled by a power of two so that its squares neither overflow nor vanish."""
    if not A.is_floating_point():
        raise TypeError(f"A singular value decomposition needs real floating-point numbers, not {A.dtype}.")
    if A.ndim != 2:
        raise ValueError(f"A singular value decomposition needs a matrix, not a tensor of shape {tuple(A.shape)}.")
    A = A.detach().to(torch.float64 if A.dtype == torch.float64 else torch.float32)
    if A.numel() == 0:
        return A, 0
    largest = max(abs(float(bound)) for bound in A.aminmax())
    if not math.isfinite(largest):
        nans, infinities = int(A.isnan().sum()), int(A.isinf().sum())
        raise ValueError(
            f"The matrix of shape {tuple(A.shape)} holds {nans} NaN and {infinities} infinite entries; "
            "it cannot be decomposed."
        )
    exponent = max(math.frexp(largest)[1] - 1, _LEAST_EXPONENT[A.dtype])
    return A / 2.0**exponent, exponent


def _checked_rank(rank: int | None, m: int, n: int) -> int:
    if rank is None:
        return min(m, n)
    if not 0 <= rank <= min(m, n):
        raise ValueError(f"A matrix of shape ({m}, {n}) has ranks from 0 to {min(m, n)}; {rank} was asked for.")
    return rank


def _decompose(A: Tensor, rank: int, purpose: Purpose, route: Route, seed: int) -> tuple[Triple, str]:
    """U (m, r), S (r,) and V (n, r) of a tall A, by the route asked for or the first that is accurate enough."""
    if route == "exact":
        return _exact(A, rank), "exact"
    if route == "randomized" or (route == "auto" and purpose == "factors" and _randomized_pays(A, rank)):
        factors = _randomized(A, rank, seed)
        if factors is not None:
            return factors, "randomized"
    narrow = A.dtype == torch.float32
    for dtype in (torch.float32, torch.float64) if narrow and purpose == "factors" else (torch.float64,):
        # Below its floor a float64 Gram matrix is still more accurate than LAPACK in float32.
        good_enough = dtype == torch.float64 and (narrow or route == "gram")
        factors = _gram(A, rank, dtype, checked=not good_enough)
        if factors is not None:
            return factors, "gram"
    return _exact(A, rank), "exact"


def _lower_gram(A: Float[Tensor, "m n"], block: int = 256) -> Float[Tensor, "n n"]:
    """The lower triangle of A^T A, which is all that the symmetric eigensolvers read, in little over half the work."""
    n = A.shape[1]
    G = A.new_zeros(n, n)
    for start in range(0, n, block):
        end = min(start + block, n)
        G[start:end, :end] = A[:, start:end].mT @ A[:, :end]
    return G


def _gram(A: Tensor, rank: int, dtype: torch.dtype, *, checked: bool) -> Triple | None:
    """By the eigenvectors V of A^T A in `dtype`; when checked, None where that type's rounding does harm.

    U comes from a QR of A V_r, so that it is orthonormal whatever the spectrum. The diagonal of R = U^T A V_r is more
    accurate than the roots of the eigenvalues, unless those come from a wider type than A's; what is off the diagonal
    is lost, and must be small beside the truncation error.
    """
    try:
        eigenvalues, V = torch.linalg.eigh(_lower_gram(A.to(dtype)))
    except torch.linalg.LinAlgError:
        return None
    S = eigenvalues[-rank:].flip(0).clamp(min=0).sqrt()
    if checked and S[-1] < _GRAM_FLOOR[dtype] * S[0]:
        return None
    V = V[:, -rank:].flip(1).to(A.dtype)
    U, R = orthonormalise(A @ V)
    if checked:
        energy = _energy(A)
        lost, rest = _energy(R.triu(1)), max(energy - _energy(R.diagonal()), 0.0)
        if lost > 1e-4 * rest + (8 * torch.finfo(A.dtype).eps) ** 2 * energy:
            return None
    if dtype == A.dtype:
        S, order = R.diagonal().sort(descending=True, stable=True)
        U, V = U[:, order], V[:, order]
    return U, S, V


def _randomized_pays(A: Float[Tensor, "m n"], rank: int) -> bool:
    """Whether eight power steps cost less than half of the Gram route, in operations weighed by measured speed."""
    m, n = A.shape
    k = _block_width(n, rank)
    step = 4 * m * n * k + 9 * (m + n) * k * k
    return rank < n / 10 and 8 * step < (m * n * n + 12 * n**3) / 2


def _block_width(n: int, rank: int) -> int:
    return min(n, rank + max(rank, 48))


def _randomized(A: Tensor, rank: int, seed: int) -> Triple | None:
    """By block power iteration; None unless the error is shown to be within `_RANDOMIZED_EXCESS` of its limit.

    The energy captured, sum S^2, grows towards that of the optimal truncation with geometrically falling gains. What
    is still to come is extrapolated from the last gain at the slower of two rates: the one observed, and the one that
    the Ritz values promise for the last direction kept, (s_k / s_r)^4.
    """
    energy = _energy(A)
    resolution = torch.finfo(A.dtype).eps * energy
    k = _block_width(A.shape[1], rank)
    V = random_basis(A.shape[1], k, seed, A)
    kept, gain = 0.0, math.inf
    for step in range(1, _RANDOMIZED_STEPS + 1):
        U, V, R = power_step(A, V)
        ritz = torch.linalg.svdvals(R.double())
        previous_gain, gain = gain, float(ritz[:rank].square().sum()) - kept
        kept += gain
        allowed = 2 * _RANDOMIZED_EXCESS * (energy - kept)
        if allowed < resolution or ritz[rank - 1] == 0:
            return None
        if step < 3:
            continue
        rate = max(gain / max(previous_gain, resolution), float(ritz[-1] / ritz[rank - 1]) ** 4)
        if gain <= resolution or (rate < 1 and gain * rate / (1 - rate) <= allowed):
            left, S, right = torch.linalg.svd(R.mT)
            return U @ left[:, :rank], S[:rank], V @ right[:rank].mT
        if rate < 1 and math.log(allowed * (1 - rate) / gain) / math.log(rate) > 1 + _RANDOMIZED_STEPS - step:
            return None
    return None


def _exact(A: Tensor, rank: int) -> Triple:
    """By LAPACK's SVD; where that does not converge, by that of the triangular factor of A in float64."""
    try:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    except torch.linalg.LinAlgError:
        Q, R = torch.linalg.qr(A.double())
        V, S, Uh = torch.linalg.svd(R.mT)
        U, Vh = Q @ Uh.mT, V.mT
    return U[:, :rank], S[:rank], Vh[:rank].mT


def _energy(A: Tensor) -> float:
    """||A||_F^2, summed in float64."""
    return float(torch.linalg.vector_norm(A, dtype=torch.float64)) ** 2


def _error(A: Tensor, U: Tensor, S: Tensor, V: Tensor) -> float:
    """||A - U diag(S) V^T||_F; see `TruncatedSVD.error`."""
    energy = _energy(A)
    rest = energy - _energy(S)
    if rest > _IDENTITY_FLOOR[A.dtype] * energy:
        return math.sqrt(rest)
    return float(torch.linalg.vector_norm(A - (U * S) @ V.mT, dtype=torch.float64))
