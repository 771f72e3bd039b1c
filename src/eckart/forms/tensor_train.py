"""Matrix product operators: a matrix as a chain of small cores (tensor trains), and what chains of any kind share."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.forms.base import FORMS, Curve, Factored, Form, Shape, check_shape, empty, spread, stored
from eckart.forms.low_rank import balance
from eckart.linalg.conjugate import is_plain
from eckart.linalg.svd import singular_values
from eckart.linalg.trains import Split, balanced, joined, weighted_train
from eckart.linalg.weighting import PLAIN, Weighting

Route = Literal["left", "right", "dense"]


class TensorTrainMatrix(Factored):
    """W[o, i] = G_1[o_1, i_1] ... G_n[o_n, i_n], a product of small matrices, one for each digit of o and i.

    Attributes:
        cores: (r, o_k, i_k, r').
    """

    def __init__(self, cores: list[nn.Parameter], split: Split, form: Form):
        super().__init__()
        self.cores = nn.ParameterList(cores)
        self.split, self.shape, self.form = split, split.shape, form

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        """By the cheapest of three routes: from the first core, from the last, or through the dense matrix."""
        batch = x.shape[:-1]
        route = self.route(math.prod(batch))
        if route == "dense":
            return F.linear(x, self.dense(), bias)
        y = self.contracted(x.reshape(math.prod(batch), x.shape[-1]), route).reshape(*batch, self.shape[0])
        return y if bias is None else y + bias

    def contracted(self, x: Float[Tensor, "b in"], route: Route) -> Float[Tensor, "b out"]:
        """x Wᵀ core by core; the matrix is never formed."""
        b, inputs = x.shape[0], math.prod(self.split.in_)
        state = F.pad(x, (0, inputs - x.shape[1]))
        if route == "left":
            done = 1
            for core in self.cores:
                r, o, i, _ = core.shape
                inputs //= i
                state = torch.einsum("bpaiz,aoic->bpocz", state.reshape(b, done, r, i, inputs), core)
                done *= o
        else:
            done = 1
            for core in reversed(self.cores):
                _, o, i, r = core.shape
                inputs //= i
                state = torch.einsum("bzicq,aoic->bzaoq", state.reshape(b, inputs, i, r, done), core)
                done *= o
        return state.reshape(b, done)[:, : self.shape[0]]

    def dense(self) -> Float[Tensor, "out in"]:
        return self.split.matrix(joined([core.flatten(1, 2) for core in self.cores]))

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        rest = ids.reshape(-1)
        digits: list[Tensor] = []
        for o in reversed(self.split.out):
            digits.append(rest % o)
            rest = rest // o
        state = self.cores[0].new_ones(len(rest), 1, 1)
        for core, digit in zip(self.cores, reversed(digits), strict=True):
            state = torch.einsum("bpa,abic->bpic", state, core[:, digit]).flatten(1, 2)
        return state[:, : self.shape[1], 0].reshape(*ids.shape, self.shape[1])

    def costs(self, tokens: int) -> dict[Route, int]:
        """Multiply-adds, counted twice, of each route over `tokens` rows."""
        found: dict[Route, int] = {"left": 0, "right": 0, "dense": 2 * tokens * self.shape[0] * self.shape[1]}
        out, in_ = self.split.out, self.split.in_
        for k, core in enumerate(self.cores):
            found["left"] += 2 * tokens * math.prod(out[:k]) * math.prod(in_[k + 1 :]) * core.numel()
            found["right"] += 2 * tokens * math.prod(in_[:k]) * math.prod(out[k + 1 :]) * core.numel()
            found["dense"] += 2 * math.prod(self.split.sizes[:k]) * core.numel() if k else 0
        return found

    def route(self, tokens: int) -> Route:
        """The cheapest route."""
        costs = self.costs(tokens)
        return min(costs, key=costs.__getitem__)

    def flops(self, tokens: int) -> int:
        return min(self.costs(tokens).values())


@dataclass(frozen=True)
class Chain(Form):
    """What forms made of cores share: `width`, the dial that limits all bonds, and how the sides are split."""

    @property
    @abstractmethod
    def width(self) -> int | None:
        """The most that a bond has; None is decided by the budget."""

    @abstractmethod
    def at(self, width: int) -> Chain:
        """The same form with this width."""

    @abstractmethod
    def split(self, shape: Shape) -> Split:
        """The factors of both sides. Raises `ValueError` where there are none."""

    @property
    def open(self) -> bool:
        return self.width is None

    def ladder(self, shape: Shape) -> list[Form]:
        """Widths that cost less than the dense matrix, from a sixteenth of the widest."""
        if not self.open:
            return [self]
        split = self.split(shape)
        most = next((w for w in range(max(split.sizes), 0, -1) if split.numbers(w) < math.prod(shape)), 0)
        most = min(most, max(split.bonds(max(1, most))))
        return [self.at(w) for w in spread(max(1, most // 16), most, 16)]

    def _closed(self, shape: Shape) -> tuple[Split, int]:
        check_shape(shape, self)
        if self.width is None:
            raise ValueError(f"{self} has no width yet: give one, or a budget that decides it")
        split = self.split(shape)
        most = max(split.bonds(math.prod(split.sizes)))
        if self.width > most:
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: no bond is ever wider than {most}")
        return split, self.width

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> TensorTrainMatrix:
        split, width = self._closed(shape)
        bonds = split.bonds(width)
        sizes = zip(bonds, split.out, split.in_, bonds[1:], strict=False)
        return TensorTrainMatrix([empty(*size, dtype=dtype, device=device) for size in sizes], split, self)

    def nbytes(self, shape: Shape, dtype: torch.dtype) -> int:
        split, width = self._closed(shape)
        return split.numbers(width) * dtype.itemsize

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> TensorTrainMatrix:
        """By successive SVDs, the best there is for two cores and equal weights; under other weights, which do not
        separate along the chain, alternating least squares from there, whose error never rises."""
        split, width = self._closed((matrix.shape[0], matrix.shape[1]))
        W = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
        cores = _even(weighted_train(W, split, split.bonds(width), weighting))
        sizes = zip(cores, split.out, split.in_, strict=True)
        parameters = [stored(c.reshape(c.shape[0], o, i, c.shape[2]).to(W.dtype), dtype or matrix.dtype) for c, o, i in sizes]  # fmt: skip # noqa: E501
        return TensorTrainMatrix(parameters, split, self)

    @property
    def fits_rungs(self) -> bool:
        return False

    def curve(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting, dtype: torch.dtype, energy: float | None = None
    ) -> Curve:
        """For two cores and equal weights the whole ladder from one spectrum; otherwise by fitting each rung."""
        shape = (matrix.shape[0], matrix.shape[1])
        split = self.split(shape)
        if not self.open or not is_plain(weighting) or split.padded or len(split.out) != 2:
            return super().curve(matrix, weighting, dtype, energy)
        forms = self.ladder(shape)
        values = singular_values(split.tensor(matrix.to(torch.promote_types(matrix.dtype, torch.float32))))
        tails = torch.cat([values.square().flip(0).cumsum(0).flip(0), values.new_zeros(1)])
        widths = [f.width or 1 for f in forms if isinstance(f, Chain)]
        return Curve(
            forms=forms,
            nbytes=[f.nbytes(shape, dtype) for f in forms],
            errors=[float(tails[min(w, len(values))]) for w in widths],
            energy=float(tails[0]) if energy is None else energy,
            spectrum=values,
        )


def _even(cores: list[Tensor]) -> list[Tensor]:
    """The same chain, with the two sides of every bond of equal norms, so that all survive half precision."""
    cores = list(cores)
    for k in range(len(cores) - 1):
        left, right = balance(cores[k].flatten(0, 1), cores[k + 1].flatten(1))
        cores[k], cores[k + 1] = left.reshape(cores[k].shape), right.reshape(cores[k + 1].shape)
    return cores


@FORMS.word("tensor_train")
@dataclass(frozen=True)
class TensorTrain(Chain):
    """A matrix product operator: `cores` cores joined by bonds (Oseledets, 2011; Novikov et al., 2015).

    Sides are split into factors of similar size; one that has none (a prime) is filled up with zeros to the next that
    has. Small bonds drop correlations between groups of digits, not directions: the matrix keeps its full rank.

    Args:
        bond: the widest bond; None is decided by the budget.
        cores: factors of each side, 2 to 8.
    """

    bond: int | None = None
    cores: int = 2

    def __post_init__(self) -> None:
        if self.bond is not None and (not isinstance(self.bond, int) or self.bond < 1):
            raise ValueError(f"tensor_train(bond={self.bond!r}): the bond is a positive integer")
        if not isinstance(self.cores, int) or not 2 <= self.cores <= 8:
            raise ValueError(f"tensor_train(cores={self.cores!r}): a chain has 2 to 8 cores")

    @property
    def width(self) -> int | None:
        return self.bond

    def at(self, width: int) -> TensorTrain:
        return replace(self, bond=width)

    def split(self, shape: Shape) -> Split:
        if min(shape) < 1:
            raise ValueError(f"{self} does not fit a matrix of shape {shape}: an empty side has no factors")
        out, in_ = (balanced(n, self.cores) for n in shape)
        return Split(shape, out, in_[::-1])  # small with large, so that no core is much larger than the others
