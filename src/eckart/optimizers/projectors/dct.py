"""Columns of the cosine transform that align best with the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from eckart.linalg.dct import dct, dct_basis
from eckart.optimizers.modes import Factors
from eckart.optimizers.projectors.base import Draw, Projector


@dataclass(frozen=True)
class DCT(Projector):
    """r vectors of one fixed basis for each width; a parameter keeps only their numbers (arXiv 2505.17967, section 3).

    With the l2 norm the choice is the best one: what is lost is the sum of the squares of the other coordinates.

    Args:
        norm: by which coordinates are ranked, `l1` or `l2`.
        path: `matmul` multiplies with the basis, `fft` takes n log n operations; both rank the same coordinates.
    """

    tensors: ClassVar[bool] = False
    norm: Literal["l1", "l2"] = "l1"
    path: Literal["matmul", "fft"] = "matmul"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"coordinates are ranked by 'l1' or 'l2', not {self.norm!r}")
        if self.path not in ("matmul", "fft"):
            raise ValueError(f"the cosine transform is taken by 'matmul' or 'fft', not {self.path!r}")

    def find(self, A: Tensor, ranks: Mapping[int, int], old: Factors, draw: Draw) -> dict[int, Tensor]:
        found = {}
        for mode, r in ranks.items():
            rows = A if mode == 1 else A.mT
            S = dct(rows) if self.path == "fft" else rows @ dct_basis(A.shape[mode], A.dtype, A.device)
            sizes = torch.linalg.vector_norm(S, 1 if self.norm == "l1" else 2, dim=0)
            found[mode] = sizes.topk(r).indices.sort().values.to(torch.int32)
        return found

    def factors(self, kept: Factors, like: Tensor) -> Factors:
        return {mode: dct_basis(like.shape[mode], like.dtype, like.device)[:, F] for mode, F in kept.items()}

    def nbytes(self, shape: tuple[int, ...], ranks: Mapping[int, int], dtype: torch.dtype) -> int:
        return sum(4 * r for r in ranks.values())
