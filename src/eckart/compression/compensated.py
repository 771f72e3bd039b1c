"""What methods share that repair a compressed matrix, or split one, by a low rank of their own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from eckart.forms import Form, LowRank, OneOf
from eckart.forms.base import Shape
from eckart.forms.in_turn import InTurn
from eckart.forms.layers import matrix_shape
from eckart.jobs.recipe import Recipe


@dataclass(frozen=True)
class WithLowRank(Recipe):
    """A recipe of which `form` describes the compressed part alone; beside it stands a low rank.

    Args:
        rank: of the low rank, at most what the layer's shape allows; 0 leaves it out. All its bytes count.
    """

    rank: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(f"{self.key}(rank={self.rank!r}): the rank is a whole number, 0 for none")

    def form_of(self, model: nn.Module, name: str) -> Form:
        form, rank = super().form_of(model, name), self.rank_for(matrix_shape(model.get_submodule(name)))
        if not rank:
            return form
        together = [self.beside(f, LowRank(rank)) for f in (form.forms if isinstance(form, OneOf) else (form,))]
        return together[0] if len(together) == 1 else OneOf(tuple(together))

    def _made_of(self) -> str:
        return (
            f"{self.form} and a low rank of {self.rank} (a smaller `rank` takes less)" if self.rank else str(self.form)
        )

    def rank_for(self, shape: Shape) -> int:
        return min(self.rank, *shape)

    def beside(self, compressed: Form, low: LowRank) -> Form:
        """The two as one form: here the low rank is fitted once, on what the compressed matrix leaves."""
        return InTurn(compressed, low)
