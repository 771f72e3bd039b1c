"""Maestro: factors whose components are trained in order of importance, and become fewer as they prove idle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.forms import LowRank
from eckart.forms.dense import DenseMatrix
from eckart.forms.nested import NestedProduct
from eckart.registry import method
from eckart.schedules import Every, Schedule
from eckart.schedules.base import add_gradient
from eckart.training.base import (
    StructuredSchedule,
    TrainingMethod,
    dtype_of,
    factored_or_dense,
    generator_of,
    like,
    put,
    weights,
)

TINY = 1e-12
"""Under the root of a tail's norm, whose gradient is infinite at 0."""


@method("maestro", family="low-rank", paper="Maestro, Horvath et al., ICML 2024, arXiv 2308.14929")
@dataclass(frozen=True)
class Maestro(TrainingMethod):
    """W = U Vᵀ, run with its first few components only in one layer at a time, so that they are in order.

    All pairs of a layer and a width take their turns in random order, one for each optimiser step. A hierarchical group
    lasso, the sum of the norms of all tails, shrinks what is idle, and components whose tails have vanished take no
    part any more. They are cut by `finish`, which multiplies out what two factors would not make smaller.

    Args:
        lasso: weight of the sum of tail norms.
        threshold: a component stays as long as the product of both its tail norms is at least this.
        shrink_every: steps between cuts (an epoch, in the paper).
        widths: at most this many widths of each layer take turns, evenly spread up to its rank; 0 for all.
    """

    lasso: float = 1e-6
    threshold: float = 1e-5
    shrink_every: int = 1000
    widths: int = 0

    def __post_init__(self) -> None:
        for name in ("lasso", "threshold"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"maestro({name}={getattr(self, name)!r}): it is not negative")
        if not isinstance(self.shrink_every, int) or self.shrink_every < 1:
            raise ValueError(f"maestro(shrink_every={self.shrink_every!r}): it is a positive number of steps")
        if not isinstance(self.widths, int) or self.widths < 0:
            raise ValueError(f"maestro(widths={self.widths!r}): it is a number of widths, 0 for all")

    def place(self, model: nn.Module, names: list[str], seed: int) -> Schedule:
        for name, W in weights(model, names):
            module = model.get_submodule(name)
            left, right = (p.detach() for p in LowRank(min(W.shape)).fit(W, dtype=dtype_of(module)).parameters())
            put(model, name, like(module, NestedProduct(left, right)))
        return OrderedTraining(model, names, self, seed)


class OrderedTraining(StructuredSchedule):
    """Widths, lasso and cuts of Maestro."""

    def __init__(self, model: nn.Module, names: list[str], settings: Maestro, seed: int):
        super().__init__(model, names)
        self.settings, self.seed = settings, seed

    @property
    def products(self) -> Iterator[NestedProduct]:
        for name in self.names:
            module: Any = self.model.get_submodule(name)
            yield module.matrix

    @property
    def needs_optimizer(self) -> bool:
        return self.settings.lasso > 0

    def at(self, step: int) -> None:
        """Everything at its rank but one layer, which is run at one of its widths."""
        ranks = [int(p.rank) for p in self.products]
        turns = [(i, width) for i, rank in enumerate(ranks) for width in self._widths(rank)]
        since = step % self.settings.shrink_every
        order = torch.randperm(len(turns), generator=generator_of(self.seed, step - since, since // len(turns)))
        chosen, width = turns[int(order[since % len(turns)])]
        for i, product in enumerate(self.products):
            product.width = width if i == chosen else ranks[i]

    def _widths(self, rank: int) -> list[int]:
        count = min(self.settings.widths or rank, rank)
        return sorted({math.ceil((j + 1) * rank / count) for j in range(count)})

    def gradients(self, step: int) -> None:
        if not self.settings.lasso:
            return
        for product in self.products:
            factors = list(product.parameters())
            with torch.enable_grad():
                found = torch.autograd.grad(self.settings.lasso * lasso(product), factors)
            for factor, gradient in zip(factors, found, strict=True):
                add_gradient(factor, gradient)

    def after(self, step: int) -> None:
        if step and Every(self.settings.shrink_every)(step):
            for product in self.products:
                product.rank.fill_(max(1, int((importance(product) >= self.settings.threshold).sum())))

    def settle(self) -> None:
        for name, product in zip(self.names, list(self.products), strict=True):
            module, rank = self.model.get_submodule(name), int(product.rank)
            left, right = product.factors(rank)
            if rank * sum(product.shape) < product.shape[0] * product.shape[1]:
                form = LowRank(rank)
                matrix = form.build(product.shape, dtype=left.dtype, device=str(left.device))
                for factor, value in zip((matrix.left, matrix.right), (left, right), strict=True):
                    assert isinstance(factor, DenseMatrix)
                    factor.weight.data.copy_(value)
                put(self.model, name, like(module, matrix))
            else:
                put(self.model, name, factored_or_dense(module, left @ right, rank))


def tails(product: NestedProduct) -> tuple[Float[Tensor, " rank"], Float[Tensor, " rank"]]:
    """Norms of what begins with each component, of the left and of the right factor."""
    left, right = product.factors(int(product.rank))
    squares = left.square().sum(0), right.square().sum(1)
    a, b = ((s.flip(0).cumsum(0).flip(0) + TINY).sqrt() for s in squares)
    return a, b


def lasso(product: NestedProduct) -> Tensor:
    """The sum of all tail norms of both factors."""
    a, b = tails(product)
    return a.sum() + b.sum()


def importance(product: NestedProduct) -> Float[Tensor, " rank"]:
    """The product of both tail norms; it never grows from one component to the next."""
    with torch.no_grad():
        a, b = tails(product)
    return a * b
