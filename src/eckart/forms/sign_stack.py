"""Residual blocks of one bit a weight: signs times a low-rank matrix of magnitudes, stacked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from eckart.forms.base import FORMS, Curve, DecodedMatrix, Form, Shape, check_shape, empty
from eckart.forms.low_rank import balance
from eckart.forms.packing import pack, packed_width, unpack
from eckart.linalg.svd import truncated_svd
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import DiagonalRoot, IdentityRoot, Root, damped_diagonal

MOST = 64
"""Blocks of one stack."""


class Block(NamedTuple):
    """One level: packed signs (out, bytes), left (out, k), right (k, in), and what is left of the matrix after it."""

    signs: UInt8[Tensor, "out bytes"]
    left: Float[Tensor, "out k"]
    right: Float[Tensor, "k in"]
    residual: Float[Tensor, "out in"]


class SignStackMatrix(DecodedMatrix):
    """sum over blocks of sign ∘ (left right), the blocks in order along the first side of every tensor.

    Attributes:
        signs: (blocks, out, bytes) uint8, one bit a weight, 1 for +1.
        left, right: (blocks, out, k) and (blocks, k, in).
    """

    signs: Tensor
    form: SignStack

    def __init__(self, signs: Tensor, left: Tensor, right: Tensor, shape: Shape, form: SignStack):
        super().__init__()
        self.register_buffer("signs", signs)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        self.shape, self.form = shape, form

    def decoded(self, rows: slice | Tensor) -> Float[Tensor, "rows in"]:
        parts = []
        for signs, left, right in zip(self.signs, self.left, self.right, strict=True):
            bits = unpack(signs[rows], 1, self.shape[1])
            magnitudes = left[rows] @ right
            parts.append(torch.where(bits.bool(), magnitudes, -magnitudes))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def flops(self, tokens: int) -> int:
        out, in_ = self.shape
        return 2 * out * in_ * (tokens + len(self.left) * (self.left.shape[2] + 1))

    def first(self, blocks: int) -> SignStackMatrix:
        """A stack of the first `blocks` blocks alone, in memory of its own; nothing is fitted again."""
        if not 1 <= blocks <= len(self.left):
            raise ValueError(f"a stack of {len(self.left)} blocks has no first {blocks}")
        signs, left, right = (t.detach()[:blocks].clone() for t in (self.signs, self.left, self.right))
        return SignStackMatrix(signs, left, right, self.shape, self.form.at(blocks))


@FORMS.word("sign_stack")
@dataclass(frozen=True)
class SignStack(Form):
    """W ≈ sum of sign(R_i) ∘ (u_i v_i), each block fitted to what those before it left (BitStack, Wang et al., ICLR
    2025, arXiv 2410.23918, section 3.2: iterative absolute value decomposition).

    |R| of a random matrix is almost of rank one, so signs and a few singular triplets of |R| leave a third of its
    energy. Diagonal weights are met exactly: signs do not change when rows and columns are scaled, so the scaled
    matrix is decomposed and the factors are scaled back. Of other weights the diagonals count. Residuals are those of
    the factors as stored, and the first blocks of a stack are the stack of fewer blocks.

    A block takes out * ceil(in / 8) bytes of signs and rank * (out + in) numbers.

    Args:
        blocks: None is decided by the budget.
        rank: of the magnitudes; the shorter side of a matrix where that is less.
    """

    blocks: int | None = None
    rank: int = 16

    def __post_init__(self) -> None:
        if self.blocks is not None and (not isinstance(self.blocks, int) or not 1 <= self.blocks <= MOST):
            raise ValueError(f"sign_stack(blocks={self.blocks!r}): a stack has 1 to {MOST} blocks")
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"sign_stack(rank={self.rank!r}): the rank is a positive integer")

    @property
    def open(self) -> bool:
        return self.blocks is None

    def at(self, blocks: int) -> SignStack:
        return replace(self, blocks=blocks)

    def ladder(self, shape: Shape) -> list[Form]:
        return [self.at(n) for n in range(1, 17)] if self.open else [self]

    def block_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """Stored bytes of one block."""
        out, in_ = shape
        return out * packed_width(in_, 1) + min(self.rank, *shape) * (out + in_) * dtype.itemsize

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        return self._blocks() * self.block_bytes(shape, dtype)

    def _blocks(self) -> int:
        if self.blocks is None:
            raise ValueError("sign_stack() has no blocks yet: say how many, or give a budget that decides it")
        return self.blocks

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> SignStackMatrix:
        check_shape(shape, self)
        (out, in_), n, k = shape, self._blocks(), min(self.rank, *shape)
        signs = torch.empty(n, out, packed_width(in_, 1), dtype=torch.uint8, device=device)
        left, right = (empty(n, *size, dtype=dtype, device=device) for size in ((out, k), (k, in_)))
        return SignStackMatrix(signs, left, right, shape, self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> SignStackMatrix:
        levels = self._levels(matrix, weighting, dtype or matrix.dtype)
        found = [next(levels)[:3] for _ in range(self._blocks())]
        signs, left, right = (torch.stack(tensors) for tensors in zip(*found, strict=True))
        return SignStackMatrix(signs, left, right, (matrix.shape[0], matrix.shape[1]), self)

    def _levels(self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype) -> Iterator[Block]:
        """Block after block, without end."""
        out, in_ = matrix.shape
        rows = scale_of(weighting.left, out).to(matrix.device)[:, None]
        columns = scale_of(weighting.right, in_).to(matrix.device)
        R = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        rows, columns = rows.to(R.dtype), columns.to(R.dtype)
        while True:
            U, S, Vh, *_ = truncated_svd(R.abs() * rows * columns, min(self.rank, out, in_))
            root = S.sqrt()
            left, right = balance(U * root / rows, root[:, None] * Vh / columns)
            left, right = left.to(dtype).contiguous(), right.to(dtype).contiguous()
            positive = R >= 0
            magnitudes = left.to(R.dtype) @ right.to(R.dtype)
            R = R - torch.where(positive, magnitudes, -magnitudes)
            yield Block(pack(positive.to(torch.uint8), 1), left, right, R)

    @property
    def fits_rungs(self) -> bool:
        return False

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        """The whole ladder, as far as it costs less than the matrix, from one decomposition."""
        if not self.open:
            return super().curve(matrix, weighting, dtype, energy)
        out, in_ = shape = (matrix.shape[0], matrix.shape[1])
        forms = [f for f in self.ladder(shape) if f.nbytes(shape, dtype) < out * in_ * dtype.itemsize]
        levels = self._levels(matrix, weighting, dtype)
        errors = [weighting.norm2(next(levels).residual) for _ in forms]
        energy = weighting.norm2(matrix) if energy is None else energy
        return Curve(forms, [f.nbytes(shape, dtype) for f in forms], errors, energy)


def scale_of(root: Root, n: int) -> Float[Tensor, " n"]:
    """Positive scales d (n,) in float64 such that diag(d)² is the weight's diagonal."""
    if isinstance(root, IdentityRoot):
        return torch.ones(n, dtype=torch.float64)
    if isinstance(root, DiagonalRoot):
        return root.d.double()
    return damped_diagonal(root.gram(n).diagonal(), 1e-8).sqrt()
