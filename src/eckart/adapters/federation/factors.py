"""The update that a federation trains: two factors, and beside them what a server has put away for good."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.adapters.base import FactoredUpdate
from eckart.adapters.frames import own
from eckart.adapters.host import Host
from eckart.linalg.products import svd_of_product

NEGLIGIBLE = 3e-7
"""Singular values of a product below this share of the norms of its factors are rounding, and are not kept."""


class Pair(NamedTuple):
    """The tensors of one layer.

    Attributes:
        B, A: (out, r) and (r, in), those that are trained.
        kept_B, kept_A: (out, k) and (k, in), of a product that is added to theirs.
    """

    B: Float[Tensor, "out r"]
    A: Float[Tensor, "r in"]
    kept_B: Float[Tensor, "out k"]
    kept_A: Float[Tensor, "k in"]


class Federated(FactoredUpdate):
    """scale * (B A + kept_B kept_A), starting at B = 0 and nothing kept.

    Args:
        out: rows of the matrix.
        A: (r, in), its start.
        scale: of the products.
        frozen: whether A is not trained.
    """

    elastic: ClassVar[tuple[str, ...]] = ("kept_B", "kept_A")
    A: Tensor
    kept_B: Tensor
    kept_A: Tensor

    def __init__(self, out: int, A: Float[Tensor, "r in"], scale: float, frozen: bool):
        super().__init__()
        self.B = nn.Parameter(A.new_zeros(out, len(A)))
        if frozen:
            self.register_buffer("A", own(A))
        else:
            self.A = nn.Parameter(own(A))
        self.register_buffer("kept_B", A.new_zeros(out, 0))
        self.register_buffer("kept_A", A.new_zeros(0, A.shape[1]))
        self.scale = scale

    def factors(self, host: Host) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
        if len(self.kept_A) == 0:
            return self.scale * self.B, self.A
        return self.scale * torch.cat([self.B, self.kept_B], 1), torch.cat([self.A, self.kept_A])

    def put(self, state: dict[str, Tensor]) -> None:
        """Take tensors over by name; those that are kept may have another rank than before."""
        own_tensors: dict[str, Any] = {**self._parameters, **self._buffers}
        with torch.no_grad():
            for name, tensor in state.items():
                if name in self.elastic:
                    setattr(self, name, tensor.to(own_tensors[name]).clone())
                else:
                    own_tensors[name].copy_(tensor)


def gaussian_rows(rank: int, width: int, generator: torch.Generator) -> Float[Tensor, "rank width"]:
    """Rows of norm about 1, to start A with."""
    return torch.randn(rank, width, generator=generator) * width**-0.5


def turned(
    B: Float[Tensor, "out k"], A: Float[Tensor, "k in"], rank: int, name: str
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"], Float[Tensor, "out rest"], Float[Tensor, "rest in"]]:
    """B' A' and a rest whose sum is B A: A' has orthonormal rows, B'ᵀ B' is diagonal and falls.

    Where the product has a lower rank, A' is completed with rows from the span of A's, and B' is zero there.
    """
    U, values, V = svd_of_product(B, A, name)
    left = U * torch.where(values > 1e-14 * values[0], values, 0.0)
    parts = (left[:, :rank], V[:rank], left[:, rank:], V[rank:])
    return tuple(part.to(B.dtype).contiguous() for part in parts)  # type: ignore[return-value]


def compacted(
    B: Float[Tensor, "out k"], A: Float[Tensor, "k in"], name: str
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The same product with the lowest rank that gives it."""
    if len(A) == 0:
        return B, A
    U, values, V = svd_of_product(B, A, name)
    count = int((values > NEGLIGIBLE * B.double().norm() * A.double().norm()).sum())
    return (U * values)[:, :count].to(B.dtype).contiguous(), V[:count].to(A.dtype).contiguous()
