"""The method of conjugate gradients, for least squares whose normal equations are too large to form."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import IdentityRoot, Root

Map = Callable[[Tensor], Tensor]


def conjugate_gradient(
    apply: Map, rhs: Float[Tensor, "*size"], x: Float[Tensor, "*size"], steps: int, tolerance: float = 1e-12
) -> Float[Tensor, "*size"]:
    """A better x with A x ≈ rhs, for A symmetric positive semi-definite (Hestenes and Stiefel, 1952).

    xᵀ A x / 2 - xᵀ rhs falls with every step, wherever it starts.

    Args:
        apply: x -> A x, linear.
        x: to start from; of any shape.
        steps: at most so many; fewer once the residual is below `tolerance` of the right-hand side.
    """
    r = rhs - apply(x)
    p, rr = r, float(r.square().sum())
    enough = tolerance**2 * float(rhs.square().sum())
    for _ in range(steps):
        Ap = apply(p)
        curvature = float((p * Ap).sum())
        if rr <= enough or curvature <= 0:
            break
        step = rr / curvature
        x, r = x + step * p, r - step * Ap
        before, rr = rr, float(r.square().sum())
        p = r + rr / before * p
    return x


def normal_map(weighting: Weighting, out: int, in_: int) -> Map:
    """M -> G M C, or F ∘ M: the derivative of half the squared weighted norm of M (out, in), in float64."""
    if weighting.each is not None:
        F = weighting.each.double()
        return lambda M: F.to(M) * M
    G, C = _gram(weighting.left, out), _gram(weighting.right, in_)

    def apply(M: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        M = M if G is None else G.to(M) @ M
        return M if C is None else M @ C.to(M)

    return apply


def _gram(root: Root, n: int) -> Float[Tensor, "n n"] | None:
    return None if isinstance(root, IdentityRoot) else root.gram(n)


def is_plain(weighting: Weighting) -> bool:
    """Whether every error counts the same."""
    sides = (weighting.left, weighting.right)
    return weighting.each is None and all(isinstance(root, IdentityRoot) for root in sides)
