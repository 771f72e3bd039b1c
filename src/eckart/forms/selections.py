"""Selections: which entries of a matrix a sparse form keeps within its pattern, and what they become."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eckart.forms.base import FORMS
from eckart.forms.language import Vocabulary
from eckart.forms.patterns import Anywhere, EveryColumn, Pattern
from eckart.linalg.feedback import feedback
from eckart.linalg.sparse_coding import omp
from eckart.linalg.weighting import Weighting
from eckart.linalg.whitening import DiagonalRoot, IdentityRoot, gram_diagonal

SELECTIONS: Vocabulary[Selection] = Vocabulary("selection", within=FORMS)
SILENT = 1e-8
"""Inputs of less than this share of the mean square count as never active, and their weights as nothing."""

Choice = tuple[Bool[Tensor, "out in"], Float[Tensor, "out in"]]


@dataclass(frozen=True)
class Selection(ABC):
    """Chooses the places to keep, and the numbers that stand there.

    Args:
        per_row: compare entries with those of their own row only, so that all rows keep equally many, give or take
            one; otherwise with those of the whole matrix. Patterns that fix this themselves are not affected.
    """

    per_row: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.per_row, bool):
            raise ValueError(f"{self.word}(per_row={self.per_row!r}): it is True or False")

    def __str__(self) -> str:
        return SELECTIONS.print(self)

    @abstractmethod
    def chooser(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Callable[[Pattern], Choice]:
        """From a pattern to the kept places and a matrix that holds their numbers (and anything elsewhere).

        What does not depend on the pattern is computed once.
        """


@dataclass(frozen=True)
class Scored(Selection):
    """Keeps the entries of the largest scores, as they are."""

    @abstractmethod
    def scores(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Float[Tensor, "out in"]:
        """What losing each entry costs. Scores of the entries of one place add up."""

    def chooser(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Callable[[Pattern], Choice]:
        scores = self.scores(W, weighting)
        return lambda pattern: (pattern.keep(scores, per_row=self.per_row), W)


@SELECTIONS.word("magnitude")
@dataclass(frozen=True)
class Magnitude(Scored):
    """The largest entries."""

    def scores(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Float[Tensor, "out in"]:
        return W.square()


@SELECTIONS.word("wanda")
@dataclass(frozen=True)
class Wanda(Scored):
    """The largest |w_ij| ||x_j||, compared within each row (Sun et al., ICLR 2024, arXiv 2306.11695, eq. 1)."""

    per_row: bool = True

    def scores(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Float[Tensor, "out in"]:
        if weighting.each is not None:
            return weighting.each.to(W) * W.square()
        return gram_diagonal(weighting.right, W.shape[1]).to(W) * W.square()


@SELECTIONS.word("fisher")
@dataclass(frozen=True)
class Fisher(Scored):
    """The largest F_ij w_ij², F the weight of single squared errors: the best choice where errors do not couple."""

    def scores(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Float[Tensor, "out in"]:
        if weighting.each is not None:
            return weighting.each.to(W) * W.square()
        left, right = gram_diagonal(weighting.left, W.shape[0]), gram_diagonal(weighting.right, W.shape[1])
        return W.square() * left.to(W)[:, None] * right.to(W)


@SELECTIONS.word("obs")
@dataclass(frozen=True)
class OBS(Selection):
    """Optimal brain surgeon, column by column (SparseGPT, Frantar and Alistarh, arXiv 2301.00774, algorithm 1).

    Of every block of columns, those are dropped whose w² / [H⁻¹]_jj is least, H⁻¹ being the inverse of the weight on
    inputs among the columns not yet done; what a dropped entry did is taken over by later columns of its row.
    A weight on outputs scales the scores of rows.

    Args:
        damping: added to the diagonal of the weight on inputs, relative to its mean.
        block: columns among which the pattern's share is chosen at once, where the pattern leaves that open.
    """

    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"obs(block={self.block!r}): the block is a positive number of columns")
        if not isinstance(self.damping, int | float) or not 0 <= self.damping < float("inf"):
            raise ValueError(f"obs(damping={self.damping!r}): the damping is a number from 0 up")

    def chooser(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Callable[[Pattern], Choice]:
        operate = self.surgeon(W, weighting)
        return lambda pattern: operate(pattern)[:2]

    def surgeon(
        self, W: Float[Tensor, "out in"], weighting: Weighting
    ) -> Callable[[Pattern], tuple[Bool[Tensor, "out in"], Float[Tensor, "out in"], Float[Tensor, "out in"]]]:
        """A chooser that also tells the score of every entry, as it was when its block was chosen."""
        out, in_ = W.shape
        C = weighting.right.gram(in_).to(W.device)
        try:
            _, U = feedback(C, "given", self.damping)
        except torch.linalg.LinAlgError:
            raise ValueError(
                f"{self}: the covariance of the inputs is singular: give some damping, such as 0.01"
            ) from None
        U = U.to(W)
        rows = gram_diagonal(weighting.left, out).to(W)[:, None]
        silent = C.diagonal() <= SILENT * C.diagonal().mean() if in_ else C.diagonal() > 0
        alive = torch.where(silent, 0.0, W)
        return lambda pattern: self._surgery(alive, U, rows, pattern)

    def _surgery(self, W: Tensor, U: Tensor, rows: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor, Tensor]:
        rest, keep = W.clone(), torch.zeros(W.shape, dtype=torch.bool, device=W.device)
        scores = torch.zeros_like(W)
        step, in_ = pattern.step(self.block), W.shape[1]
        block = max(step, self.block - self.block % step)
        for start in range(0, in_, block):
            end = min(start + block, in_)
            errors = rest.new_zeros(W.shape[0], end - start)
            for i in range(start, end):
                if (i - start) % step == 0:
                    here = slice(i, min(i + step, end))
                    scores[:, here] = rows * (rest[:, here] / U.diagonal()[here]).square()
                    keep[:, here] = pattern.keep(scores[:, here], i, self.per_row)
                error = torch.where(keep[:, i], 0.0, rest[:, i]) / U[i, i]
                rest[:, i + 1 : end] -= error[:, None] * U[i, i + 1 : end]
                errors[:, i - start] = error
            rest[:, end:] -= errors @ U[start:end, end:]
        return keep, rest, scores


@SELECTIONS.word("omp")
@dataclass(frozen=True)
class OMP(Selection):
    """Orthogonal matching pursuit: in every line the entry that explains most of what is left, then all of them anew.

    For patterns with a fixed number of entries in every row (under the weight on inputs) or every column (under that
    on outputs); the weight on the other side couples lines, and is not used.
    """

    def chooser(self, W: Float[Tensor, "out in"], weighting: Weighting) -> Callable[[Pattern], Choice]:
        def choose(pattern: Pattern) -> Choice:
            by_column = isinstance(pattern, EveryColumn)
            root = weighting.left if by_column else weighting.right
            if weighting.each is not None or isinstance(root, IdentityRoot | DiagonalRoot):
                return pattern.keep(Fisher().scores(W, weighting)), W
            if not (by_column or (isinstance(pattern, Anywhere) and pattern.even and pattern.group == 1)):
                raise ValueError("omp() needs a form with a fixed number of entries in every row or column")
            lines = W.T if by_column else W
            G = root.gram(lines.shape[1]).to(W)
            index, values = omp(G, lines @ G, pattern.places.count // max(1, lines.shape[0]))
            found = torch.zeros_like(lines).scatter(1, index, values)
            keep = torch.zeros(lines.shape, dtype=torch.bool, device=W.device).scatter(1, index, True)
            return (keep.T, found.T) if by_column else (keep, found)

        return choose
