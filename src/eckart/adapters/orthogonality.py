"""The pull that keeps factors of an update near orthonormal, as AdaLoRA and IncreLoRA have it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.schedules.base import add_gradient

Factor = tuple[Sequence[nn.Parameter], int]
"""Parameters which, put together along the dimension, are a factor; that dimension counts what is to be orthonormal."""


def distance(rows: Float[Tensor, "r n"]) -> Float[Tensor, ""]:
    """||M Mᵀ - I||_F, not squared, as in the authors' code, to which the usual strengths belong."""
    return torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype))


def pull(factors: Sequence[Factor], strength: float) -> None:
    """Add to the gradients that of strength times the mean distance of all factors."""
    for parameters, dim in factors:
        own = [p.detach().float().requires_grad_(True) for p in parameters]
        with torch.enable_grad():
            together = torch.cat(own, dim)
            loss = strength / len(factors) * distance(together if dim == 0 else together.T)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, own), strict=True):
            add_gradient(parameter, gradient)
