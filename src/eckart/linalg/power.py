"""Block power iteration: the leading singular subspace of a matrix, improved step by step from the last one.

Simultaneous (orthogonal) iteration as in Golub and Van Loan, Matrix Computations, section 8.2. A step costs two
products with the matrix and two thin QRs, so whoever holds a good subspace of yesterday's matrix (an optimiser's
projector, a stream's basis) refreshes it for a small share of a decomposition.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Side = Literal["left", "right"]


def orthonormalise(X: Float[Tensor, "n r"]) -> tuple[Float[Tensor, "n r"], Float[Tensor, "r r"]]:
    """Thin QR with a non-negative diagonal of R, which makes it unique when X has full column rank.

    Args:
        X: (n, r) with r <= n; columns that depend on earlier ones are replaced by orthonormal ones.

    Returns:
        Q (n, r) with orthonormal columns and R (r, r) upper triangular, X = Q R.
    """
    Q, R = torch.linalg.qr(X)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(X.dtype)
    return Q * signs, R * signs[:, None]


def power_step(
    A: Float[Tensor, "m n"], V: Float[Tensor, "n k"]
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "n k"], Float[Tensor, "k k"]]:
    """One step of block power iteration with A^T A, orthonormalised after each of the two products.

    Args:
        A: (m, n), m >= k and n >= k.
        V: (n, k), the subspace so far.

    Returns:
        U (m, k) = orth(A V), V' (n, k) = orth(A^T U) and R (k, k) with A^T U = V' R. The singular values of R are the
        Ritz values: the best estimates of A's leading singular values from this subspace, never above the true ones.
    """
    U, _ = orthonormalise(A @ V)
    V, R = orthonormalise(A.mT @ U)
    return U, V, R


def random_basis(n: int, r: int, seed: int, like: Tensor) -> Float[Tensor, "n r"]:
    """A seeded Gaussian start (n, r) of `like`'s dtype and device; drawn on the CPU so that devices agree."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, r, generator=generator, dtype=like.dtype).to(like.device)


class BlockPower:
    """A basis of a leading singular subspace that follows a slowly changing matrix.

    Column j of the basis converges to the j-th singular vector, and keeps its sign and place from one update to the
    next, so that what is stored in its coordinates (moments, sketches) stays meaningful.

    Args:
        rank: r, the number of columns of the basis.
        side: "right" for a basis of R^n that spans rows of A (m, n), "left" for one of R^m that spans columns.
        seed: of the Gaussian start, which is drawn at the first update.

    Attributes:
        basis: (n, r) or (m, r) with orthonormal columns, float32 or float64; None before the first update.
    """

    def __init__(self, rank: int, *, side: Side = "right", seed: int = 0) -> None:
        if rank < 1:
            raise ValueError(f"BlockPower needs a rank of at least 1, not {rank}.")
        if side not in ("left", "right"):
            raise ValueError(f"BlockPower's side is 'left' or 'right', not {side!r}.")
        self.rank = rank
        self.side: Side = side
        self.seed = seed
        self.basis: Tensor | None = None

    @torch.no_grad()
    def update(self, A: Float[Tensor, "m n"], steps: int = 1) -> Float[Tensor, "dim r"]:
        """Improve the basis by `steps` power steps on A, from the last basis, and return it.

        A matrix of zeros has no leading subspace and leaves the basis as it is. Raises ValueError when A is not
        finite, too small for the rank, or of another width than the basis, and when `steps` is below 1.
        """
        if steps < 1:
            raise ValueError(f"BlockPower.update needs at least 1 step, not {steps}.")
        A = self._oriented(A)
        scale = A.abs().amax()
        if not torch.isfinite(scale):
            raise ValueError("The matrix given to BlockPower.update holds NaN or infinite entries.")
        if self.basis is None:
            V, _ = orthonormalise(random_basis(A.shape[1], self.rank, self.seed, A))
        else:
            V = self.basis.to(A)
        if scale > 0:
            A = A / scale
            for _ in range(steps):
                _, V, _ = power_step(A, V)
        self.basis = V
        return V

    @torch.no_grad()
    def residual(self, A: Float[Tensor, "m n"]) -> float:
        """The share of A that the basis misses: ||A - A Q Q^T||_F / ||A||_F, from 0 to 1 (0 for A = 0).

        For the left side, ||A - Q Q^T A||_F / ||A||_F. Raises RuntimeError before the first update.
        """
        if self.basis is None:
            raise RuntimeError("BlockPower.residual needs a basis: call update first.")
        A = self._oriented(A)
        Q = self.basis.to(A)
        whole = float(torch.linalg.vector_norm(A, dtype=torch.float64))
        missed = float(torch.linalg.vector_norm(A - (A @ Q) @ Q.mT, dtype=torch.float64))
        return missed / whole if whole > 0 else 0.0

    def state_dict(self) -> dict[str, Tensor]:
        """The basis as a plain tensor; empty before the first update."""
        return {} if self.basis is None else {"basis": self.basis}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the basis of a `state_dict`. Raises ValueError when it holds anything else or another rank."""
        if set(state) - {"basis"}:
            raise ValueError(f"BlockPower's state holds only 'basis'; it was given {sorted(state)}.")
        basis = state.get("basis")
        if basis is not None and (basis.ndim != 2 or basis.shape[1] != self.rank or not basis.isfinite().all()):
            raise ValueError(
                f"BlockPower of rank {self.rank} needs a finite basis of shape (n, {self.rank}), "
                f"not one of shape {tuple(basis.shape)}."
            )
        self.basis = None if basis is None else basis.detach().clone()

    def _oriented(self, A: Tensor) -> Tensor:
        """A in float32 or float64, transposed where the left subspace is wanted, its shape checked."""
        if A.ndim != 2 or not A.is_floating_point():
            raise ValueError(f"BlockPower needs a real floating-point matrix, not {A.dtype} of shape {tuple(A.shape)}.")
        A = A.detach().to(torch.float64 if A.dtype == torch.float64 else torch.float32)
        A = A.mT if self.side == "left" else A
        if min(A.shape) < self.rank:
            raise ValueError(f"BlockPower of rank {self.rank} is too large for a matrix of sides {tuple(A.shape)}.")
        if self.basis is not None and self.basis.shape[0] != A.shape[1]:
            raise ValueError(
                f"BlockPower holds a basis of R^{self.basis.shape[0]} for the {self.side} side, "
                f"but was given a matrix with {A.shape[1]} there."
            )
        return A
