"""Few groups of consecutive columns (GQSA, arXiv 2412.17560, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from eckart.forms.base import FORMS, Form, Shape
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
    """

    density: float | None = None
    group: int = 16
    selection: Selection = field(default_factory=Fisher)

    def __post_init__(self) -> None:
        check_density(self.density, "group_sparse")
        if not isinstance(self.group, int) or self.group < 1:
            raise ValueError(f"group_sparse(group={self.group!r}): the group is a positive number of columns")
        self._check_selection()

    @property
    def open(self) -> bool:
        return self.density is None

    def _units(self, shape: Shape) -> tuple[int, int]:
        group = min(self.group, max(1, shape[1]))
        return group, shape[0] * -(-shape[1] // group)

    def ladder(self, shape: Shape) -> list[Form]:
        if not self.open:
            return [self]
        units = self._units(shape)[1]
        by_count = {round(d * units): d for d in reversed(DENSITIES)}
        return [replace(self, density=d) for count, d in sorted(by_count.items()) if count]

    def pattern(self, shape: Shape) -> Pattern:
        group, units = self._units(shape)
        return Anywhere(shape, group, count=density_count(self.density, units, self))
