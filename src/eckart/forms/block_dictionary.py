"""A dictionary for every block of columns, and sparse codes of its own for every row in it (DSFormer)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eckart.forms.algebra import ProductMatrix
from eckart.forms.base import FORMS, Form, Shape, check_shape, spread, stored
from eckart.forms.block_diagonal import BlockDiagonal, BlockDiagonalMatrix
from eckart.forms.dictionary import Coded, check_positive, coded
from eckart.forms.semi_sparse import SemiSparse
from eckart.linalg.weighting import PLAIN, Weighting
from eckart.linalg.whitening import IdentityRoot, psd_root

RUNGS = 24


@FORMS.word("block_dictionary")
@dataclass(frozen=True)
class BlockDictionary(Coded):
    """Block j of columns is S_j D_j: rows of S_j have exactly `nonzeros` entries (DSFormer, arXiv 2312.13211).

    Every fragment of a row is made of a few of its block's atoms, which suits what is locally of low rank. The codes of
    all blocks together are `semi_sparse(n=nonzeros, m=atoms)`, and the dictionaries `block_diagonal()`. Fitted block by
    block as `dictionary` is; what a weight on inputs couples across blocks is not used.

    Args:
        nonzeros: entries of a code; None is decided by the budget.
        atoms: of every block, at most 64; at most the rows of the matrix are used.
        block: most columns of a block; blocks are as equal as the width allows, and the last is padded.
        iterations: of pursuit and K-SVD, at most.
        power_steps: of the rank-one fit of an atom.
        seed: which rows the atoms start from.
    """

    nonzeros: int | None = None
    atoms: int = 64
    block: int = 32
    iterations: int = 20
    power_steps: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self.nonzeros, "nonzeros", "block_dictionary", optional=True)
        for name in ("atoms", "block", "iterations", "power_steps"):
            check_positive(getattr(self, name), name, "block_dictionary")
        if self.atoms > 64:
            raise ValueError(f"block_dictionary(atoms={self.atoms}): a block has at most 64 atoms")

    @property
    def open(self) -> bool:
        return self.nonzeros is None

    def sizes(self, shape: Shape) -> tuple[int, int, int]:
        """Blocks, atoms and columns of each."""
        blocks = max(1, -(-shape[1] // self.block))
        return blocks, min(self.atoms, shape[0]), -(-shape[1] // blocks)

    def ladder(self, shape: Shape) -> list[Form]:
        if not self.open:
            return [self]
        return [replace(self, nonzeros=s) for s in spread(1, min(self.sizes(shape)[1:]), RUNGS)]

    def codes(self, shape: Shape) -> SemiSparse:
        """The form of the codes of all blocks together."""
        _, k, block = self.sizes(shape)
        if self.nonzeros is None:
            raise ValueError(f"{self} has no number of entries yet: give nonzeros, or a budget that decides it")
        if self.nonzeros > min(k, block):
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: a code has at most {min(k, block)} entries")  # fmt: skip # noqa: E501
        return SemiSparse(self.nonzeros, k)

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> ProductMatrix:
        check_shape(shape, self)
        blocks, k, _ = self.sizes(shape)
        codes = self.codes(shape).build((shape[0], blocks * k), dtype=dtype, device=device)
        return ProductMatrix(
            codes, BlockDiagonal(blocks).build((blocks * k, shape[1]), dtype=dtype, device=device), self
        )

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> ProductMatrix:
        out, in_ = matrix.shape
        blocks, k, block = self.sizes((out, in_))
        form = self.codes((out, in_))
        plain = isinstance(weighting.right, IdentityRoot)
        C = torch.empty(0) if plain else weighting.right.gram(in_)
        W = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        X, keep = W.new_zeros(out, blocks * k), torch.zeros(out, blocks * k, dtype=torch.bool, device=W.device)
        D = W.new_zeros(blocks, k, block)
        for j in range(blocks):
            here, codes = slice(j * block, min((j + 1) * block, in_)), slice(j * k, (j + 1) * k)
            own = Weighting(weighting.left, weighting.right if plain else psd_root(C[here, here], 1e-9, "eigen"))
            n = min(form.n or 0, k)
            X[:, codes], keep[:, codes], D[j, :, : here.stop - here.start] = coded(W[:, here], own, self, k, n)
        return self.holding(X, keep, D, in_, dtype or matrix.dtype)

    def holding(
        self, X: Float[Tensor, "out codes"], keep: Bool[Tensor, "out codes"], D: Float[Tensor, "blocks k b"], in_: int,
        dtype: torch.dtype,
    ) -> ProductMatrix:  # fmt: skip
        """The module with these codes, of which `keep` says where they may differ from zero, and these atoms."""
        atoms = BlockDiagonalMatrix(stored(D, dtype), (D.shape[0] * D.shape[1], in_), BlockDiagonal(D.shape[0]))
        return ProductMatrix(self.codes((X.shape[0], in_)).holding(keep, X, dtype), atoms, self)
