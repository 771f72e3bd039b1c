"""Few groups of consecutive columns (GQSA, arXiv 2412.17560, section 3.1)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

from eckart.forms.algebra import RUNGS_OF_A_SUM, thin
from eckart.forms.base import FORMS, Form, Shape
from eckart.forms.dense import Dense
from eckart.forms.patterns import Anywhere, Pattern
from eckart.forms.selections import Fisher, Selection
from eckart.forms.sparse import DENSITIES, SparseForm, check_density, density_count


@FORMS.word("group_sparse")
@dataclass(frozen=True)
class GroupSparse(SparseForm):
    """Whole groups of `group` consecutive columns of one row are kept or dropped: round(density * groups) are kept.

    Stored as block-sparse rows: the kept groups' values, the index of each group in its row as the narrowest integer,
    and where each row begins; or a bitmap over the groups where that is smaller. A group is as good as the sum of its
    entries' scores. Where the group does not divide the width, the last one of a row is stored in full length.

    Args:
        density: share of groups kept; None is decided by the budget.
        group: columns in a group; at most all of them.
        selection: which groups.
        values: the form of the kept numbers, all in order as a matrix of one row, so that
            `group_sparse(group=16, values=quantized(bits=4, group=16))` gives every kept group a grid of its own.
    """

    density: float | None = None
    group: int = 16
    selection: Selection = field(default_factory=Fisher)
    values: Form = field(default_factory=Dense)

    def __post_init__(self) -> None:
        check_density(self.density, "group_sparse")
        if not isinstance(self.group, int) or self.group < 1:
            raise ValueError(f"group_sparse(group={self.group!r}): the group is a positive number of columns")
        self._check_selection()
        if not isinstance(self.values, Form):
            raise ValueError(f"group_sparse(values={self.values!r}): that is no form")

    @property
    def open(self) -> bool:
        return self.density is None or self.values.open

    def _units(self, shape: Shape) -> tuple[int, int]:
        group = min(self.group, max(1, shape[1]))
        return group, shape[0] * -(-shape[1] // group)

    def ladder(self, shape: Shape) -> list[Form]:
        if not self.open:
            return [self]
        group, units = self._units(shape)
        by_count = {round(d * units): d for d in (1.0, *reversed(DENSITIES))}
        densities = [d for count, d in sorted(by_count.items()) if count] if self.density is None else [self.density]
        rungs = thin(self.values.ladder((1, units * group)), RUNGS_OF_A_SUM)
        return [replace(self, density=d, values=values) for values, d in itertools.product(rungs, densities)]

    def pattern(self, shape: Shape) -> Pattern:
        group, units = self._units(shape)
        return Anywhere(shape, group, count=density_count(self.density, units, self))
