"""Blocks along the diagonal: groups of outputs that each read a group of inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from eckart.forms.base import FORMS, Factored, Form, Shape, check_shape, empty, stored
from eckart.linalg.conjugate import conjugate_gradient, normal_map
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, IdentityRoot

STEPS = 50


class BlockDiagonalMatrix(Factored):
    """`blocks` (count, a, b): rows k a to (k + 1) a read columns k b to (k + 1) b; the rest is cut."""

    def __init__(self, blocks: nn.Parameter, shape: Shape, form: BlockDiagonal):
        super().__init__()
        self.blocks, self.shape, self.form = blocks, shape, form

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        count, _, b = self.blocks.shape
        parts = F.pad(x, (0, count * b - x.shape[-1])).unflatten(-1, (count, b))
        y = torch.einsum("...kb,kab->...ka", parts, self.blocks).flatten(-2)[..., : self.shape[0]]
        return y if bias is None else y + bias

    def dense(self) -> Float[Tensor, "out in"]:
        return _placed(self.blocks, self.shape)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.blocks.numel()


@FORMS.word("block_diagonal")
@dataclass(frozen=True)
class BlockDiagonal(Form):
    """diag(B_1, ..., B_k), blocks of equal size; those at the end may reach over the edge and are cut off there.

    Entries within the blocks are the matrix's own where errors do not couple, which is the optimum; under weights with
    couplings, least squares from there by conjugate gradients.

    Args:
        blocks: None is decided by the budget.
    """

    blocks: int | None = None

    def __post_init__(self) -> None:
        if self.blocks is not None and (not isinstance(self.blocks, int) or self.blocks < 1):
            raise ValueError(f"block_diagonal(blocks={self.blocks!r}): the number of blocks is a positive integer")

    @property
    def open(self) -> bool:
        return self.blocks is None

    def ladder(self, shape: Shape) -> list[Form]:
        """Numbers of blocks that divide both sides; powers of two where there are none."""
        if not self.open:
            return [self]
        common = math.gcd(*shape)
        counts = [n for n in range(2, common + 1) if common % n == 0]
        counts = counts or [2**k for k in range(1, max(0, min(shape)).bit_length()) if 2**k <= min(shape)]
        return [replace(self, blocks=n) for n in reversed(counts)]

    def _size(self, shape: Shape) -> tuple[int, int, int]:
        check_shape(shape, self)
        if self.blocks is None:
            raise ValueError("block_diagonal() has no blocks yet: say how many, or give a budget that decides it")
        if self.blocks > min(shape):
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: it has at most {min(shape)} blocks")
        return self.blocks, -(-shape[0] // self.blocks), -(-shape[1] // self.blocks)

    def build(
        self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None
    ) -> BlockDiagonalMatrix:
        return BlockDiagonalMatrix(empty(*self._size(shape), dtype=dtype, device=device), shape, self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> BlockDiagonalMatrix:
        shape = (matrix.shape[0], matrix.shape[1])
        size = self._size(shape)
        blocks = _taken(matrix.detach(), size)
        roots = (weighting.left, weighting.right)
        if weighting.each is None and not all(isinstance(root, IdentityRoot | DiagonalRoot) for root in roots):
            normal = normal_map(weighting, *shape)
            blocks = conjugate_gradient(
                lambda B: _taken(normal(_placed(B, shape)), size),
                _taken(normal(matrix.detach().double()), size),
                blocks.double(),
                STEPS,
            )
        return BlockDiagonalMatrix(stored(blocks.to(matrix.dtype), dtype), shape, self)


def _placed(blocks: Float[Tensor, "k a b"], shape: Shape) -> Float[Tensor, "out in"]:
    """The matrix with these blocks."""
    return torch.block_diag(*blocks)[: shape[0], : shape[1]]


def _taken(M: Float[Tensor, "out in"], size: tuple[int, int, int]) -> Float[Tensor, "k a b"]:
    """The blocks of a matrix; zeros beyond its edges."""
    count, a, b = size
    filled = F.pad(M, (0, count * b - M.shape[1], 0, count * a - M.shape[0]))
    k = torch.arange(count, device=M.device)
    return filled.view(count, a, count, b)[k, :, k]
