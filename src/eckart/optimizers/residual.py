"""What happens to the part of a gradient that its projection misses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from eckart.optimizers.checks import check_not_negative
from eckart.optimizers.modes import Factors, added, expand
from eckart.optimizers.rules import Direction
from eckart.optimizers.storage import Plain, State, Storage


@dataclass(frozen=True)
class Split:
    """A gradient and its projection, within one step.

    Attributes:
        A: the gradient, with what `before` added, in float32 or float64.
        R: its coordinates.
        direction: what the inner rule made of R.
        scale: by which the projected direction is multiplied.
    """

    A: Tensor
    R: Tensor
    factors: Factors
    direction: Direction
    scale: float

    def left(self, share: float = 1.0) -> Tensor:
        """A - share * back(R)."""
        return added(self.A, self.R, self.factors, -share)

    def back(self, N: Tensor) -> Tensor:
        """Coordinates as a tensor of the full shape."""
        return expand(N, self.factors, tuple(self.A.shape))


@dataclass(frozen=True)
class Residual(ABC):
    """A rule for the rest."""

    updates_rest: ClassVar[bool] = True
    """Whether parameters move outside of their subspace in one step."""

    def before(self, state: State, G: Tensor) -> Tensor:
        """The gradient that is projected."""
        return G

    @abstractmethod
    def rest(self, state: State, split: Split) -> Tensor | None:
        """What is subtracted, times the learning rate, besides the projected direction; None is nothing."""

    def nbytes(self, shape: tuple[int, ...], ranks: Mapping[int, int], dtype: torch.dtype) -> int:
        """Bytes that are kept for it."""
        return 0


@dataclass(frozen=True)
class Drop(Residual):
    """It is dropped (GaLore)."""

    updates_rest: ClassVar[bool] = False

    def rest(self, state: State, split: Split) -> Tensor | None:
        return None


@dataclass(frozen=True)
class Sign(Residual):
    """Its sign, times the projected scale and `scale` (FRUGAL with signSGD)."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative("the residual's scale", self.scale)

    def rest(self, state: State, split: Split) -> Tensor | None:
        return split.left().sign_().mul_(split.scale * self.scale)


@dataclass(frozen=True)
class Plainly(Residual):
    """As it is, times the projected scale and `scale` (FRUGAL with SGD)."""

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_not_negative("the residual's scale", self.scale)

    def rest(self, state: State, split: Split) -> Tensor | None:
        return split.left().mul_(split.scale * self.scale)


@dataclass(frozen=True)
class NormScaled(Residual):
    """As much larger or smaller as the inner rule made the projection, and not growing too fast (Fira, section 4).

    phi = ||N|| / (||R|| + 1e-8), over the projected modes; the norm of phi times the rest may grow by `growth` a step.

    Args:
        growth: gamma of the limiter, at least 1; None does not limit.
        factors: one `column` of the rest at a time, or one for the whole `matrix`.
        overlap: the rest is G - scale * back(R), as released, which keeps some of the projection; else G - back(R).
    """

    growth: float | None = 1.01
    factors: Literal["column", "matrix"] = "column"
    overlap: bool = True

    def __post_init__(self) -> None:
        if self.growth is not None and not self.growth >= 1:
            raise ValueError(f"a norm-growth limiter's factor is at least 1, or None, not {self.growth}")
        if self.factors not in ("column", "matrix"):
            raise ValueError(f"the rest is scaled by 'column' or 'matrix', not {self.factors!r}")

    def rest(self, state: State, split: Split) -> Tensor | None:
        if not split.factors:
            return None
        S = split.left(split.scale if self.overlap else 1.0)
        modes = tuple(split.factors) if self.factors == "column" else tuple(range(S.dim()))
        changed, before, sizes = (
            torch.linalg.vector_norm(x, dim=modes, keepdim=True) for x in (split.direction.N, split.R, S)
        )
        ratios = changed / (before + 1e-8)
        if self.growth is not None:
            ratios = ratios * self.limit(state, torch.linalg.vector_norm(ratios * sizes))
        return S.mul_(ratios * split.direction.gain)

    def limit(self, state: State, norm: Tensor) -> Tensor:
        """What to multiply a rest of this norm by, so that it grows slowly; a last norm of zero limits nothing."""
        assert self.growth is not None
        last = state.get("residual_norm", torch.zeros_like(norm)).to(norm.dtype)
        limited = torch.where(last > 0, torch.minimum(norm, self.growth * last), norm)
        state["residual_norm"] = limited
        return torch.where(norm > 0, limited / norm, 1.0)

    def nbytes(self, shape: tuple[int, ...], ranks: Mapping[int, int], dtype: torch.dtype) -> int:
        return dtype.itemsize if self.growth is not None and ranks else 0


@dataclass(frozen=True)
class ErrorFeedback(Residual):
    """It is kept, and added to the next gradient (arXiv 2505.17967, algorithm 1).

    Args:
        storage: how it is kept.
    """

    updates_rest: ClassVar[bool] = False
    storage: Storage = field(default_factory=Plain)

    def before(self, state: State, G: Tensor) -> Tensor:
        error = self.storage.get(state, "error")
        return G if error is None else G + error.to(G.dtype)

    def rest(self, state: State, split: Split) -> Tensor | None:
        self.storage.put(state, "error", split.left())
        return None

    def nbytes(self, shape: tuple[int, ...], ranks: Mapping[int, int], dtype: torch.dtype) -> int:
        return self.storage.nbytes(shape, dtype)
