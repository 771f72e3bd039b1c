"""The SVD of a product of two thin matrices, which is never formed."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from eckart.linalg.whitening import check_finite


@torch.no_grad()
def svd_of_product(
    B: Float[Tensor, "m r"], A: Float[Tensor, "r n"], name: str = "the product"
) -> tuple[Float64[Tensor, "m k"], Float64[Tensor, " k"], Float64[Tensor, "k n"]]:
    """U diag(S) V = B A with k = min(r, m, n), S descending, by two QR decompositions and the SVD of a small core.

    The rows of V are orthonormal and in the row space of A whatever the rank of B A: where the core is zero they are
    the Q of Aᵀ.

    Args:
        B, A: the factors.
        name: what they are, for messages.

    Raises `ValueError` where the shapes do not meet, or a number is not finite.
    """
    if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0]:
        raise ValueError(f"{name}: factors of shapes {tuple(B.shape)} and {tuple(A.shape)} have no product: their ranks must be the same")  # fmt: skip # noqa: E501
    check_finite(B, f"the left factor of {name}")
    check_finite(A, f"the right factor of {name}")
    Q_left, R_left = torch.linalg.qr(B.double())
    Q_right, R_right = torch.linalg.qr(A.double().T)
    U, S, V = torch.linalg.svd(R_left @ R_right.T, full_matrices=False)
    return Q_left @ U, S, V @ Q_right.T
