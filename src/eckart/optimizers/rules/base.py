"""What an inner rule is: how a (projected) gradient becomes a direction, entry by entry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from eckart.optimizers.storage import Plain, State, Storage


class Direction(NamedTuple):
    """`gain * N` is subtracted, times the learning rate; the gain is what a bias correction makes of the step size.

    N may be the gradient or a moment itself: it is read, never written into.
    """

    N: Tensor
    gain: float


@dataclass(frozen=True)
class Rule(ABC):
    """Turns gradients into directions, and keeps moments in the state. It never writes into the gradient.

    Args:
        storage: how the moments are kept.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    """Names of all moments, which have the gradient's shape unless `shapes` says otherwise."""
    squared: ClassVar[tuple[str, ...]] = ()
    """Those of them that must not become negative."""

    storage: Storage = field(default_factory=Plain, kw_only=True)

    @property
    def elementwise(self) -> bool:
        """Whether an entry's direction depends on that entry's gradients alone."""
        return True

    @abstractmethod
    def direction(self, state: State, R: Tensor, k: int) -> Direction:
        """The direction for one gradient R, the k-th since the moments were zero (from 1)."""

    def directions(self, states: Sequence[State], Rs: Sequence[Tensor], ks: Sequence[int]) -> list[Direction]:
        """The directions of many at once; the loop over `direction` is the naive twin of faster ones."""
        return [self.direction(*each) for each in zip(states, Rs, ks, strict=True)]

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of the moments of a gradient of this shape."""
        return dict.fromkeys(self.buffers, shape)

    def stored(self, name: str) -> Storage:
        """How this moment is kept."""
        return self.storage

    def moments(self, state: State, R: Tensor) -> list[Tensor]:
        """All moments, zeros where there are none yet."""
        found = []
        for name, shape in self.shapes(tuple(R.shape)).items():
            kept = self.stored(name).get(state, name)
            found.append(R.new_zeros(shape) if kept is None else kept.to(R.dtype))
        return found

    def keep(self, state: State, R: Tensor, moments: Sequence[Tensor]) -> None:
        for name, moment in zip(self.shapes(tuple(R.shape)), moments, strict=True):
            self.stored(name).put(state, name, moment)

    def clear(self, state: State) -> None:
        """Forget all moments."""
        for name in self.buffers:
            self.stored(name).drop(state, name)

    def turn(self, state: State, turned: Callable[[Tensor], Tensor]) -> None:
        """Express the moments in new coordinates. What must not be negative is made positive."""
        for name in self.buffers:
            moment = self.stored(name).get(state, name)
            if moment is not None:
                new = turned(moment)
                self.stored(name).put(state, name, new.abs() if name in self.squared else new)

    def nbytes(self, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of the moments of a gradient of this shape, computed with in `dtype`."""
        return sum(self.stored(name).nbytes(s, dtype) for name, s in self.shapes(shape).items())
