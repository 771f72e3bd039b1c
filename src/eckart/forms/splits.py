"""Sums taken apart: what stays in the base, and the low-rank update that an adapter carries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.forms.algebra import ProductMatrix, Sum, SumMatrix
from eckart.forms.base import Factored
from eckart.forms.layers import DropIn


class Split(NamedTuple):
    """A matrix as `rest + left @ right`."""

    rest: Factored
    left: Float[Tensor, "out r"]
    right: Float[Tensor, "r in"]

    @property
    def rank(self) -> int:
        return self.right.shape[0]


def split(matrix: Factored) -> Split | None:
    """A sum without its products that are thin inside, and these as one; None where one of the two would be empty.

    A product that rounds its inputs stays in the sum: an adapter's factors do not.
    """
    if not isinstance(matrix, SumMatrix):
        return None
    thin: list[ProductMatrix] = []
    others: list[Factored] = []
    for term in matrix.terms:
        assert isinstance(term, Factored)
        if isinstance(term, ProductMatrix) and term.exact and term.left.shape[1] < min(term.shape):
            thin.append(term)
        else:
            others.append(term)
    if not thin or not others:
        return None
    rest = others[0] if len(others) == 1 else SumMatrix(others, Sum(tuple(t.form for t in others)))
    left = torch.cat([t.left.dense().detach() for t in thin], dim=1)
    return Split(rest, left, torch.cat([t.right.dense().detach() for t in thin]))


def splits(model: nn.Module) -> tuple[dict[str, Split], dict[str, str]]:
    """Layer -> its parts, for the layers an adapter can serve; layer -> why not, for those with other factors."""
    factored = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, DropIn)}
    holders = Counter(id(m.matrix) for m in factored.values())
    found: dict[str, Split] = {}
    whole: dict[str, str] = {}
    for name, module in factored.items():
        parts = split(module.matrix)
        if parts is None:
            whole[name] = f"{module.matrix.form} has no low-rank term beside others"
        elif module.kind not in ("linear", "conv1d"):
            whole[name] = f"it is a layer of kind {module.kind}"
        elif holders[id(module.matrix)] > 1:
            whole[name] = "it shares its matrix with another layer"
        else:
            found[name] = parts
    return found, whole


def rank_pattern(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most frequent rank, and where ranks differ those of all layers, as PEFT wants them in its `rank_pattern`.

    There the first key that a layer's name ends with counts, so longer ones come first.
    """
    common = Counter(ranks.values()).most_common(1)[0][0]
    if all(rank == common for rank in ranks.values()):
        return common, {}
    return common, {name: ranks[name] for name in sorted(ranks, key=lambda name: (-len(name), name))}
