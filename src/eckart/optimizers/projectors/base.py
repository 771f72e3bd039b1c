"""What a projector is: how the subspace is chosen in which a gradient's moments are kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from eckart.optimizers.modes import Factors, overlap
from eckart.optimizers.storage import Plain, State, Storage

Side = Literal["std", "reverse", "left", "right", "full"]


@dataclass(frozen=True)
class Draw:
    """Where and when a subspace is chosen; all that a random choice depends on.

    Attributes:
        index, count: the parameter is number `index` of `count` projected ones.
        refresh: how many times this parameter's subspace was chosen before.
        seed: of the optimiser.
    """

    index: int = 0
    count: int = 1
    refresh: int = 0
    seed: int = 0

    @property
    def number(self) -> int:
        """A seed of its own for every parameter and refresh."""
        return (self.seed * 1_000_003 + self.index) * 1_000_003 + self.refresh


@dataclass(frozen=True)
class Projector(ABC):
    """Chooses a factor for some modes of a gradient; its moments are kept in the coordinates of these factors.

    Args:
        side: which side of a matrix shrinks. `std` the shorter one (the right one of square matrices), `reverse` the
            longer, `left` the first, `right` the second, `full` both. All modes of tensors with more than two shrink.
        storage: how the factors are kept.
    """

    tensors: ClassVar[bool] = True
    """Whether tensors with more than two modes can be projected."""
    orthonormal: ClassVar[bool] = True
    """Whether factors are directions, which can be turned into one another, rather than a choice of whole tensors."""

    side: Side = "std"
    storage: Storage = field(default_factory=Plain, kw_only=True)

    def __post_init__(self) -> None:
        if self.side not in get_args(Side):
            raise ValueError(f"a projector's side is one of {', '.join(get_args(Side))}, not {self.side!r}")

    @abstractmethod
    def find(self, A: Tensor, ranks: Mapping[int, int], old: Factors, draw: Draw) -> dict[int, Tensor]:
        """A factor for every mode in `ranks`, none of which has rank 0.

        Args:
            A: the gradient, finite, in float32 or float64.
            old: the factors so far, as they are kept; empty at the first time.
        """

    def modes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The modes that shrink."""
        if len(shape) > 2:
            return tuple(range(len(shape)))
        tall = shape[0] >= shape[1]
        return {"std": (int(tall),), "reverse": (int(not tall),), "left": (0,), "right": (1,), "full": (0, 1)}[
            self.side
        ]

    def limit(self, shape: tuple[int, ...], mode: int) -> int:
        """The largest rank of a mode's factor."""
        return shape[mode]

    def ranks(self, shape: tuple[int, ...], group: Mapping[str, Any], draw: Draw) -> dict[int, int]:
        """The rank of every mode that shrinks: the group's rank, or its density times the mode's size."""
        asked = group["rank"]
        return {
            mode: min(round(group["density"] * shape[mode]) if asked is None else asked, self.limit(shape, mode))
            for mode in self.modes(shape)
        }

    def choose(self, A: Tensor, ranks: Mapping[int, int], old: Factors, draw: Draw) -> dict[int, Tensor]:
        """`find`, where there is anything to find: a mode of rank 0 gets an empty selection."""
        wanted = {mode: r for mode, r in ranks.items() if r}
        found = self.find(A, wanted, {mode: old[mode] for mode in wanted if mode in old}, draw) if wanted else {}
        nothing = torch.zeros(0, dtype=torch.int32, device=A.device)
        return {mode: found.get(mode, nothing) for mode in ranks}

    def keep(self, state: State, factors: Factors, p: Tensor) -> None:
        """Put factors of a parameter into the state instead of earlier ones, floating point ones in its dtype."""
        for mode in range(p.dim()):
            self.storage.drop(state, _name(mode))
            state.pop(_name(mode), None)
        for mode, F in factors.items():
            if F.is_floating_point():
                self.storage.put(state, _name(mode), F.to(p.dtype))
            else:
                state[_name(mode)] = F

    def kept(self, state: State, like: Tensor) -> dict[int, Tensor]:
        """The factors as they are kept, floating point ones in `like`'s dtype."""
        found = {}
        for mode in range(like.dim()):
            F = state.get(_name(mode))
            F = self.storage.get(state, _name(mode)) if F is None else F
            if F is not None:
                found[mode] = F.to(like.dtype) if F.is_floating_point() else F
        return found

    def factors(self, kept: Factors, like: Tensor) -> Factors:
        """The factors to multiply with, from those kept."""
        return kept

    def overlap(self, old: Tensor, new: Tensor) -> Tensor:
        """(r_old, r_new): what turns coordinates in an old factor into those in a new one."""
        return overlap(old, new)

    def nbytes(self, shape: tuple[int, ...], ranks: Mapping[int, int], dtype: torch.dtype) -> int:
        """Bytes of the factors in the state."""
        return sum(self.storage.nbytes((shape[mode], r), dtype) for mode, r in ranks.items() if r)


def low_shape(shape: tuple[int, ...], ranks: Mapping[int, int]) -> tuple[int, ...]:
    """The shape of a projected gradient."""
    return tuple(ranks.get(mode, size) for mode, size in enumerate(shape))


def _name(mode: int) -> str:
    return f"basis_{mode}"


def unfolded(A: Tensor, mode: int) -> Tensor:
    """A as a matrix (the mode's size, everything else)."""
    return A.movedim(mode, 0).reshape(A.shape[mode], math.prod(A.shape) // max(1, A.shape[mode]))
