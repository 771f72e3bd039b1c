"""Error feedback: what an error in one column is worth in the columns that come after it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Feedback(NamedTuple):
    """How errors are moved on.

    Attributes:
        columns: the order in which columns are worked on.
        U: upper triangular, Uᵀ U the inverse of the weight in that order, in float64. An error e in the i-th column is
            best made up for by taking e U_ij / U_ii from every later column j, and then costs (e / U_ii)².
    """

    columns: Int[Tensor, " in"]
    U: Float[Tensor, "in in"]


def feedback(C: Float[Tensor, "in in"], order: str, damping: float) -> Feedback:
    """The feedback under a weight on inputs.

    Inputs that are never active get the mean weight: their columns take no errors and give none.

    Args:
        C: symmetric, positive semi-definite.
        order: `activation` takes columns by descending weight, `given` as they stand.
        damping: added to the diagonal, relative to its mean.

    Raises `torch.linalg.LinAlgError` where the damped weight is not positive definite.
    """
    C = C.double().clone()
    diagonal = C.diagonal()
    active = diagonal > 0
    diagonal.copy_(torch.where(active, diagonal, diagonal[active].mean() if bool(active.any()) else 1.0))
    columns = torch.arange(C.shape[0], device=C.device)
    if order == "activation":
        columns = diagonal.sort(descending=True, stable=True).indices
    if C.shape[0]:
        diagonal.add_(damping * diagonal.mean())
    # the upper factor R of C = R Rᵀ is the lower one of C with its rows and columns in reverse, and U its inverse
    backwards = columns.flip(0)
    R = torch.linalg.cholesky(C[backwards][:, backwards]).flip(0, 1)
    return Feedback(columns, torch.linalg.solve_triangular(R, torch.eye(C.shape[0]).to(C), upper=True))
