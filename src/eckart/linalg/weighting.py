"""The norm that a fit minimises: || Lᵀ Δ R ||, with weights on the outputs and on the inputs of a matrix."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.whitening import IdentityRoot, Root, gram_diagonal, psd_root


@dataclass(frozen=True)
class Weighting:
    """Weights on both sides of an error Δ (out, in).

    Attributes:
        left: root L of the weight G = L Lᵀ (out, out) on outputs.
        right: root R of the weight C = R Rᵀ (in, in) on inputs.
        mean: (in,) mean input μ, when what the mean does to the output is to be moved into the bias: the weights then
            describe the centred inputs, and the layer's bias gains (W - Ŵ) μ.
        each: (out, in) weights F of single squared errors, where the norm is sum F Δ²; L and R then are its best
            two-sided stand-in, for solvers that need one.
    """

    left: Root = field(default_factory=IdentityRoot)
    right: Root = field(default_factory=IdentityRoot)
    mean: Float[Tensor, " in"] | None = None
    each: Float[Tensor, "out in"] | None = None

    def apply(self, M: Float[Tensor, "out in"]) -> Float[Tensor, "a b"]:
        """Lᵀ M R."""
        return self.left.times(self.right.times(M).T).T

    def norm2(self, M: Float[Tensor, "out in"]) -> float:
        """|| Lᵀ M R ||²_F, or sum F M² where every entry has its own weight, in float64."""
        M = M.detach().double()
        return float((self.apply(M).square() if self.each is None else self.each.to(M) * M.square()).sum())

    def importance(self, shape: tuple[int, int]) -> Float[Tensor, "out in"]:
        """How much the square of a single error counts, couplings left out: F, or the diagonals' outer product."""
        if self.each is not None:
            return self.each
        return gram_diagonal(self.left, shape[0])[:, None] * gram_diagonal(self.right, shape[1])

    def unapply_left(self, M: Float[Tensor, "a k"]) -> Float[Tensor, "out k"]:
        """L⁻ᵀ M."""
        return self.left.over(M.T).T

    def through_left(self, A: Float[Tensor, "out k"]) -> Weighting:
        """The norm of Y in A Y: weight Aᵀ G A on its rows, the same on its columns."""
        G = A.double().T @ self.left.gram(A.shape[0]).to(A.device) @ A.double()
        return Weighting(psd_root(G, damping=1e-12, kind="eigen"), self.right)

    def through_right(self, B: Float[Tensor, "k in"]) -> Weighting:
        """The norm of X in X B: the same weight on its rows, B C Bᵀ on its columns."""
        C = B.double() @ self.right.gram(B.shape[1]).to(B.device) @ B.double().T
        return Weighting(self.left, psd_root(C, damping=1e-12, kind="eigen"))


PLAIN = Weighting()


def weighted_lstsq_right(
    A: Float[Tensor, "out k"],
    W: Float[Tensor, "out in"],
    weighting: Weighting,
    near: Float[Tensor, "k in"],
    damping: float = 1e-10,
) -> Float[Tensor, "k in"]:
    """argmin_Y || Lᵀ (W - A Y) R ||, in float64: the weight on inputs drops out.

    What A hardly sees of Y (singular values of Lᵀ A below `damping` of the largest) stays as it is in `near`.
    """
    A, W, near = A.double(), W.double(), near.double()
    return near + _correction(weighting.left.times(A.T).T, weighting.left.times((W - A @ near).T).T, damping)


def weighted_lstsq_left(
    B: Float[Tensor, "k in"],
    W: Float[Tensor, "out in"],
    weighting: Weighting,
    near: Float[Tensor, "out k"],
    damping: float = 1e-10,
) -> Float[Tensor, "out k"]:
    """argmin_X || Lᵀ (W - X B) R ||, in float64: the weight on outputs drops out; `near` as on the right side."""
    B, W, near = B.double(), W.double(), near.double()
    return near + _correction(weighting.right.times(B).T, weighting.right.times(W - near @ B).T, damping).T


def _correction(A: Float[Tensor, "a k"], rest: Float[Tensor, "a b"], damping: float) -> Float[Tensor, "k b"]:
    """argmin_D || rest - A D ||² + (damping || A ||)² || D ||², with the spectral norm of A."""
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    floor = damping * S[:1]
    gain = torch.where(S > 0, S / (S.square() + floor.square()), 0.0)
    return Vh.T @ (gain[:, None] * (U.T @ rest))
