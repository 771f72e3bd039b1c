"""Few entries, anywhere; and what all sparse forms share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eckart.forms.algebra import thin
from eckart.forms.base import FORMS, Curve, Factored, Form, Shape, check_shape
from eckart.forms.dense import Dense
from eckart.forms.patterns import Anywhere, Pattern
from eckart.forms.places import Stored
from eckart.forms.products import csr_pays, csr_product, group_pays, group_product
from eckart.forms.scattered import scattered_product
from eckart.forms.selections import Fisher, Selection
from eckart.linalg.weighting import PLAIN, Weighting

ANCHORS = 8
DENSITIES = (0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, *(round(0.01 * i, 2) for i in range(1, 100)))


class SparseMatrix(Factored):
    """`kept`, all kept numbers in order as a matrix of one row, and the tensors that say where they stand.

    Places are counted along `pattern.places`. Reading them raises `ValueError` where they are not as they should be.
    """

    kept: Factored

    def __init__(self, kept: Factored, places: Stored, form: SparseForm, pattern: Pattern):
        super().__init__()
        self.kept, self.form, self.pattern, self.shape = kept, form, pattern, pattern.shape
        for name, tensor in places.items():
            self.register_buffer(name, tensor)

    @property
    def values(self) -> Float[Tensor, "*places_and_group"]:
        """The kept numbers: (places, group), or (places,) where a place is one number."""
        group = self.pattern.group
        return self.kept.dense().view(-1) if group == 1 else self.kept.dense().view(-1, group)

    def flat(self) -> Int[Tensor, " places"]:
        """Line * width + place of every value, ascending."""
        return self.pattern.places.decode(self._stored)

    @property
    def _stored(self) -> Stored:
        return {name: getattr(self, name) for name in self.pattern.places.empty("meta")}

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        by_rows, places = self.pattern.places.lines == self.shape[0], self.pattern.places
        if not learns and by_rows and self.pattern.group == 1 and csr_pays(x, self.shape, places.count):
            y = csr_product(x, *places.by_line(self._stored), self.values, self.shape)
        elif not learns and by_rows and self.pattern.group > 1 and group_pays(x, self.shape, self.kept.shape[1]):
            y = group_product(x, *places.by_line(self._stored), self.values, self.shape)
        elif learns:
            return scattered_product(x, self.values, self.flat(), self.pattern, bias)
        else:
            return F.linear(x, self.dense(), bias)
        return y if bias is None else y + bias

    def dense(self) -> Float[Tensor, "out in"]:
        places, values = self.pattern.places, self.values
        table = values.new_zeros(places.lines * places.width, *values.shape[1:])
        table = table.index_copy(0, self.flat(), values)
        return self.pattern.join(table.view(places.lines, places.width, self.pattern.group))

    def flops(self, tokens: int) -> int:
        return 2 * tokens * self.kept.shape[1]


class SparseForm(Form):
    """What sparse forms share: a pattern for every shape, and a selection that chooses within it."""

    selection: Selection
    values: Form = Dense()
    """Of the kept numbers, as a matrix of one row."""

    @abstractmethod
    def pattern(self, shape: Shape) -> Pattern:
        """The pattern of the closed form. Raises `ValueError` where it does not fit the shape."""

    def _check_selection(self) -> None:
        if not isinstance(self.selection, Selection):
            raise ValueError(f"{self.word}(selection={self.selection}): that is no selection")

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> SparseMatrix:
        check_shape(shape, self)
        pattern = self.pattern(shape)
        kept = self.values.build((1, pattern.places.count * pattern.group), dtype=dtype, device=device)
        return SparseMatrix(kept, pattern.places.empty(device), self, pattern)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> SparseMatrix:
        W = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        pattern = self.pattern((W.shape[0], W.shape[1]))
        return self.holding(*self.selection.chooser(W, weighting)(pattern), dtype or matrix.dtype, weighting)

    def holding(
        self, keep: Bool[Tensor, "out in"], numbers: Float[Tensor, "out in"], dtype: torch.dtype,
        weighting: Weighting = PLAIN,
    ) -> SparseMatrix:  # fmt: skip
        """The module that holds these numbers at these places, which are as many as the pattern has.

        Where the numbers have a form of their own, single errors count as they do in the weighting.
        """
        shape = (keep.shape[0], keep.shape[1])
        pattern = self.pattern(shape)
        mask = pattern.spread(keep).any(-1)

        def row(M: Tensor) -> Float[Tensor, "1 numbers"]:
            return pattern.spread(M)[mask].view(1, -1)

        each = PLAIN
        if not isinstance(self.values, Dense):
            each = Weighting(each=row(weighting.importance(shape).to(numbers.device)))
        kept = self.values.fit(row(torch.where(keep, numbers, 0.0)), each, dtype=dtype)
        return SparseMatrix(kept, pattern.places.encode(mask), self, pattern)

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        W = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        choose = self.selection.chooser(W, weighting)

        def error(form: Form) -> float:
            assert isinstance(form, SparseForm)
            module = form.holding(*choose(form.pattern((W.shape[0], W.shape[1]))), dtype, weighting)
            return weighting.norm2(W - module.dense().detach().to(W.dtype))

        energy = weighting.norm2(W) if energy is None else energy
        ladders: dict[str, list[Form]] = {}
        for form in self.ladder((W.shape[0], W.shape[1])):
            assert isinstance(form, SparseForm)
            ladders.setdefault(str(form.values), []).append(form)
        curves = [sampled_curve(ladder, W, dtype, energy, ANCHORS, error) for ladder in ladders.values()]
        points = (p for c in curves for p in zip(c.nbytes, c.errors, c.forms, strict=True))
        return curves[0] if len(curves) == 1 else Curve.of(points, energy)


def sampled_curve(
    ladder: list[Form], W: Float[Tensor, "out in"], dtype: torch.dtype, energy: float, anchors: int,
    error: Callable[[Form], float],
) -> Curve:  # fmt: skip
    """Errors of some rungs as `error` finds them, between those by their root, which is taken as linear in bytes."""
    nbytes = {form: form.nbytes((W.shape[0], W.shape[1]), dtype) for form in ladder}
    forms = sorted(ladder, key=nbytes.__getitem__)
    known = {nbytes[form]: error(form) for form in thin(forms, anchors)}
    return Curve(forms, [nbytes[f] for f in forms], [_between(known, nbytes[f]) for f in forms], energy)


def _between(known: dict[int, float], nbytes: int) -> float:
    below = max((b for b in known if b <= nbytes), default=min(known))
    above = min((b for b in known if b >= nbytes), default=max(known))
    if above == below:
        return known[below]
    share = (nbytes - below) / (above - below)
    return float(((1 - share) * known[below] ** 0.5 + share * known[above] ** 0.5) ** 2)


def density_count(density: float | None, places: int, form: Form) -> int:
    """How many of the places a density keeps."""
    if density is None:
        raise ValueError(f"{form} has no density yet: give one, or a budget that decides it")
    return round(density * places)


def check_density(density: float | None, word: str) -> None:
    if density is not None and (isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1):  # fmt: skip # noqa: E501
        raise ValueError(f"{word}(density={density!r}): the density is a share above 0, up to 1")


@FORMS.word("sparse")
@dataclass(frozen=True)
class Sparse(SparseForm):
    """round(density * out * in) entries, anywhere.

    The values are stored in the storage dtype. Their places are the column of each, in 1 byte up to 256 columns, 2 up
    to 32768 and 4 beyond, with the start of every row in 4 bytes; or one bit for every place of the matrix, rows
    beginning at bytes: whichever is smaller, which shape and density decide (about a sixteenth is where 2-byte columns
    break even).

    Args:
        density: share of entries kept; None is decided by the budget.
        selection: which ones.
    """

    density: float | None = None
    selection: Selection = field(default_factory=Fisher)

    def __post_init__(self) -> None:
        check_density(self.density, "sparse")
        self._check_selection()

    @property
    def open(self) -> bool:
        return self.density is None

    def ladder(self, shape: Shape) -> list[Form]:
        if not self.open:
            return [self]
        by_count = {round(d * shape[0] * shape[1]): d for d in reversed(DENSITIES)}
        return [replace(self, density=d) for count, d in sorted(by_count.items()) if count]

    def pattern(self, shape: Shape) -> Pattern:
        return Anywhere(shape, count=density_count(self.density, shape[0] * shape[1], self))
