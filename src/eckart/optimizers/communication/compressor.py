"""What every way to compress a gradient owes: a setting to choose, its bytes, its error, and the exchange itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.distributed import Work

from eckart.optimizers.checks import is_whole
from eckart.optimizers.communication.wire import Wire

Shape = tuple[int, int]
Rounds = Generator[Work, None, list[tuple[Tensor, Tensor]]]
"""Yields every collective once it is started, to be resumed when it is done."""
COMPRESSORS: dict[str, type[Compressor]] = {}


@dataclass
class Layer:
    """A compressed parameter, seen as a matrix, and what is kept for it from step to step.

    Attributes:
        dials: the settings it may have.
        dial: the setting it has.
        error: what has not been sent so far, of this process's gradients.
        basis: (m, r), where power iteration goes on.
        total: sum of the gradients from which the next settings are chosen.
    """

    name: str
    index: int
    shape: Shape
    default: int
    dials: tuple[int, ...]
    dial: int
    error: Float[Tensor, "n m"] | None = None
    basis: Float[Tensor, "m r"] | None = None
    total: Float[Tensor, "n m"] | None = None


@dataclass(frozen=True)
class Draw:
    """Seeds of one step: what is random is drawn anew from them, and no generator has to be saved."""

    seed: int
    step: int
    plans: int

    def shared(self, layer: Layer) -> int:
        """The same on all processes, and until settings are chosen anew."""
        return _number(self.seed, self.plans, layer.index)

    def own(self, layer: Layer, rank: int) -> int:
        """Another one for every process and step."""
        return _number(self.seed, self.step, layer.index, rank)


def _number(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """A way to send less than a gradient, with a whole number, the dial, that says how much.

    Args:
        low, high: settings between these multiples of the default one are to choose from.
        min_rate: gradients that do not shrink by more than this factor at the default setting are sent as they are.
    """

    unbiased: ClassVar[bool] = False
    """Whether the expectation of what arrives is the gradient; then errors are not fed back, which they might blow up."""  # fmt: skip # noqa: E501

    low: float = 0.5
    high: float = 2.0
    min_rate: float = 2.0

    def __init_subclass__(cls, word: str | None = None) -> None:
        if word:
            COMPRESSORS[word] = cls

    def __post_init__(self) -> None:
        if not 0 < self.low <= 1 <= self.high < float("inf"):
            raise ValueError(f"{self}: settings range from low, above 0 and at most 1, to high, 1 or more")
        if not self.min_rate > 0:
            raise ValueError(f"{self}: min_rate is a positive factor")

    @abstractmethod
    def default(self, shape: Shape) -> int:
        """The uniform setting."""

    @abstractmethod
    def dials(self, shape: Shape) -> tuple[int, ...]:
        """All settings to choose from, the default one among them."""

    @abstractmethod
    def nbytes(self, shape: Shape, dial: int, itemsize: int) -> int:
        """Bytes that a process sends of a gradient whose numbers have `itemsize` bytes."""

    @abstractmethod
    def errors(self, M: Float[Tensor, "n m"], dials: Sequence[int]) -> Float[np.ndarray, " dials"]:
        """||M - C(M)||_F at each setting, C being without noise or the root of the mean square being taken."""

    @abstractmethod
    def exchange(
        self, layers: Sequence[Layer], matrices: Sequence[Tensor], dtype: torch.dtype, wire: Wire, draw: Draw
    ) -> Rounds:
        """Average matrices over all processes.

        Args:
            matrices: of each layer, in float32 or float64.
            dtype: of floating point numbers that are sent.

        Returns:
            For each layer the average as it arrives everywhere, and what of it stands for this process's matrix.
        """

    def shrinks(self, shape: Shape, itemsize: int) -> bool:
        """Whether a gradient is worth compressing."""
        n, m = shape
        return self.nbytes(shape, self.default(shape), itemsize) * self.min_rate < n * m * itemsize


@dataclass(frozen=True, kw_only=True)
class Packed(Compressor):
    """A compressor whose messages cannot be added up: every process gets those of all others."""

    @abstractmethod
    def encode(self, M: Float[Tensor, "n m"], dial: int, dtype: torch.dtype, seed: int) -> UInt8[Tensor, " bytes"]:
        """The message, `nbytes` long."""

    @abstractmethod
    def decode(self, message: UInt8[Tensor, " bytes"], dial: int, dtype: torch.dtype, like: Tensor) -> Tensor:
        """What a message says, in the shape and dtype of `like`."""

    def exchange(
        self, layers: Sequence[Layer], matrices: Sequence[Tensor], dtype: torch.dtype, wire: Wire, draw: Draw
    ) -> Rounds:
        pairs = list(zip(layers, matrices, strict=True))
        messages = [self.encode(M, layer.dial, dtype, draw.own(layer, wire.rank)) for layer, M in pairs]
        work, everyone = wire.gather(torch.cat(messages), "compressed")
        yield work
        found = []
        parts = everyone.split([x.numel() for x in messages], dim=1)
        for (layer, M), received in zip(pairs, parts, strict=True):
            each = [self.decode(message, layer.dial, dtype, M) for message in received]
            found.append((sum(each[1:], each[0].clone()).div_(wire.world), each[wire.rank]))
        return found


def check_whole(word: str, name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ValueError where a setting is not a whole number within its limits."""
    if not is_whole(value) or not least <= value or (most is not None and value > most):  # type: ignore[operator]
        span = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"the {name} of {word} is a whole number {span}, not {value!r}")
