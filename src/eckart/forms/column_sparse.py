"""As many entries in every column, or in every row: the codes of dictionaries."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace

from eckart.forms.base import FORMS, Form, Shape, spread
from eckart.forms.patterns import Anywhere, EveryColumn, Pattern
from eckart.forms.selections import OMP, Selection
from eckart.forms.sparse import SparseForm

RUNGS = 24


class LineSparse(SparseForm):
    """What `column_sparse` and `row_sparse` share."""

    nonzeros: int | None

    def __post_init__(self) -> None:
        if self.nonzeros is not None and (not isinstance(self.nonzeros, int) or self.nonzeros < 1):
            word = self.word  # type: ignore[attr-defined]
            raise ValueError(f"{word}(nonzeros={self.nonzeros!r}): the number of entries is a positive integer")
        self._check_selection()

    @property
    def open(self) -> bool:
        return self.nonzeros is None

    @abstractmethod
    def length(self, shape: Shape) -> int:
        """Of a line."""

    def ladder(self, shape: Shape) -> list[Form]:
        if not self.open:
            return [self]
        return [replace(self, nonzeros=s) for s in spread(1, self.length(shape) - 1, RUNGS)]  # type: ignore[call-arg]

    def _nonzeros(self, shape: Shape) -> int:
        if self.nonzeros is None:
            raise ValueError(f"{self} has no number of entries yet: give nonzeros, or a budget that decides it")
        if self.nonzeros > self.length(shape):
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: a line has {self.length(shape)} places")
        return self.nonzeros


@FORMS.word("column_sparse")
@dataclass(frozen=True)
class ColumnSparse(LineSparse):
    """Exactly `nonzeros` entries in every column, so that `dense() @ column_sparse()` makes each of a few atoms.

    Stored column after column: the values, and their rows as the narrowest integers, or one bit for every place where
    that is smaller; nothing says where a column begins.

    Args:
        nonzeros: entries of a column; None is decided by the budget.
        selection: which ones, and what they become.
    """

    nonzeros: int | None = None
    selection: Selection = field(default_factory=OMP)

    def length(self, shape: Shape) -> int:
        return shape[0]

    def pattern(self, shape: Shape) -> Pattern:
        return EveryColumn(shape, nonzeros=self._nonzeros(shape))


@FORMS.word("row_sparse")
@dataclass(frozen=True)
class RowSparse(LineSparse):
    """Exactly `nonzeros` entries in every row, so that `row_sparse() @ dense()` makes each row of a few atoms.

    Stored as `column_sparse` is, by rows. A weight on inputs couples no two rows, so that this is the code of a
    dictionary that is learnt under the covariance of a layer's inputs.

    Args:
        nonzeros: entries of a row; None is decided by the budget.
        selection: which ones, and what they become.
    """

    nonzeros: int | None = None
    selection: Selection = field(default_factory=OMP)

    def length(self, shape: Shape) -> int:
        return shape[1]

    def pattern(self, shape: Shape) -> Pattern:
        return Anywhere(shape, count=shape[0] * self._nonzeros(shape), even=True)
