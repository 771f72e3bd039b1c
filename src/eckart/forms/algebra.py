"""The two combinators: sums of forms, fitted term by term, and products, fitted factor by factor."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from eckart.forms.base import Factored, Form, Shape, check_shape
from eckart.forms.dense import Dense, widths
from eckart.linalg.svd import truncated_svd
from eckart.linalg.weighting import PLAIN, Weighting, weighted_lstsq_left, weighted_lstsq_right

SWEEPS, RUNGS, RUNGS_OF_A_SUM = 30, 12, 36
SETTLED = 1e-4


class SumMatrix(Factored):
    """The sum of its `terms`, all of one shape."""

    def __init__(self, terms: list[Factored], form: Form):
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.shape, self.form = terms[0].shape, form

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        y = self.terms[0](x, bias)
        for term in self.terms[1:]:
            y = y + term(x)
        return y

    def dense(self) -> Float[Tensor, "out in"]:
        total = self._term(0).dense()
        for i in range(1, len(self.terms)):
            total = total + self._term(i).dense()
        return total

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        return torch.stack([self._term(i).rows(ids) for i in range(len(self.terms))]).sum(0)

    def flops(self, tokens: int) -> int:
        added = tokens * self.shape[0] * (len(self.terms) - 1)
        return added + sum(self._term(i).flops(tokens) for i in range(len(self.terms)))

    def _term(self, i: int) -> Factored:
        term = self.terms[i]
        assert isinstance(term, Factored)
        return term


class ProductMatrix(Factored):
    """left (out, k) @ right (k, in), never multiplied out in the forward pass."""

    left: Factored
    right: Factored

    def __init__(self, left: Factored, right: Factored, form: Form):
        super().__init__()
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"{form}: the factors do not meet, {left.shape} @ {right.shape}")
        self.left, self.right, self.form = left, right, form
        self.shape = (left.shape[0], right.shape[1])

    def forward(
        self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*batch out"]:
        # not through __call__, whose bookkeeping takes longer than the product of a thin factor with one vector
        return self.left.forward(self.right.forward(x), bias)

    def dense(self) -> Float[Tensor, "out in"]:
        return self.left.dense() @ self.right.dense()

    def rows(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch in"]:
        return self.left.rows(ids) @ self.right.dense()

    def flops(self, tokens: int) -> int:
        return self.left.flops(tokens) + self.right.flops(tokens)


@dataclass(frozen=True)
class Sum(Form):
    """a + b + ...: fitted by block coordinate descent, each term on what the others leave, best single term first."""

    terms: tuple[Form, ...]

    def __post_init__(self) -> None:
        flat = itertools.chain.from_iterable(t.terms if isinstance(t, Sum) else (t,) for t in self.terms)
        object.__setattr__(self, "terms", tuple(flat))

    def __str__(self) -> str:
        return " + ".join(str(t) for t in self.terms)

    @property
    def open(self) -> bool:
        return any(t.open for t in self.terms)

    def ladder(self, shape: Shape) -> list[Form]:
        per_term = max(2, round(RUNGS_OF_A_SUM ** (1 / max(1, sum(t.open for t in self.terms)))))
        rungs = [thin(t.ladder(shape), per_term) for t in self.terms]
        return [Sum(combination) for combination in itertools.product(*rungs)]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> SumMatrix:
        return SumMatrix([t.build(shape, dtype=dtype, device=device) for t in self.terms], self)

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> SumMatrix:
        alone = [term.fit(matrix, weighting, dtype=dtype) for term in self.terms]
        errors = [weighting.norm2(matrix - f.dense().detach().to(matrix.dtype)) for f in alone]
        order = sorted(range(len(alone)), key=errors.__getitem__)
        start = {order[0]: alone[order[0]]}
        return SumMatrix(descend(self.terms, order, matrix, weighting, dtype, SWEEPS, start), self)


def descend(
    terms: Sequence[Form], order: Sequence[int], matrix: Float[Tensor, "out in"], weighting: Weighting,
    dtype: torch.dtype | None, sweeps: int, start: Mapping[int, Factored] | None = None,
) -> list[Factored]:  # fmt: skip
    """Terms whose sum is near the matrix, by block coordinate descent: each fitted on what the others leave, in order.

    Ends after `sweeps`, or where one gains little or nothing; the best sweep's terms are returned, so that the error
    never grows with the number of sweeps.

    Args:
        order: in which terms are fitted; those not yet fitted count as zero.
        start: by index, fits of a term on the whole matrix that are known already, for the first of the order.
    """
    known = start or {}
    fitted: dict[int, Factored] = {}
    parts: dict[int, Tensor] = {}
    best: list[Factored] = []
    least, before, energy = float("inf"), float("inf"), weighting.norm2(matrix)
    for _ in range(sweeps):
        for i in order:
            rest = matrix - sum((p for j, p in parts.items() if j != i), torch.zeros_like(matrix))
            ready = i in known and not parts
            fitted[i] = known[i] if ready else terms[i].fit(rest, weighting, dtype=dtype)
            parts[i] = fitted[i].dense().detach().to(matrix.dtype)
        error = weighting.norm2(matrix - sum(parts.values(), torch.zeros_like(matrix)))
        if not best or error < least:
            best, least = [fitted[i] for i in range(len(terms))], error
        if _settled(before, error, energy):
            break
        before = error
    return best


@dataclass(frozen=True)
class Product(Form):
    """left @ right: fitted by alternating least squares from the truncated SVD of the weighted matrix.

    Holding one factor fixed, the error in the other is its distance from the least-squares solution under the weight
    that the fixed factor induces, so every leaf's own solver serves unchanged.
    """

    left: Form
    right: Form

    def __str__(self) -> str:
        return " @ ".join(f"({f})" if isinstance(f, Sum) or (f is self.right and isinstance(f, Product)) else str(f)
                          for f in (self.left, self.right))  # fmt: skip

    @property
    def open(self) -> bool:
        return self._inner_if_closed((1, 1)) is None or self.left.open or self.right.open

    def _inner_if_closed(self, shape: Shape) -> int | None:
        left, right = self.left.inner(out=shape[0]), self.right.inner(in_=shape[1])
        if left is not None and right is not None and left != right and shape != (1, 1):
            raise ValueError(f"{self}: the factors do not meet on shape {shape}, {left} columns against {right} rows")
        return left if left is not None else right

    def inner(self, out: int | None = None, in_: int | None = None) -> int | None:
        if out is not None:
            return self.right.inner(out=self.left.inner(out=out))
        return self.left.inner(in_=self.right.inner(in_=in_))

    def ladder(self, shape: Shape) -> list[Form]:
        inner = self._inner_if_closed(shape)
        if inner is None:
            if not isinstance(self.left, Dense) and not isinstance(self.right, Dense):
                raise ValueError(f"{self}: no factor says how wide the product is inside; give one dense(width=..)")
            rungs: list[Form] = []
            for width in widths(shape):
                narrow = Dense(width)
                closed = Product(narrow, self.right) if isinstance(self.left, Dense) else Product(self.left, narrow)
                rungs += closed.ladder(shape)
            return rungs
        lefts = thin(self.left.ladder((shape[0], inner)), RUNGS)
        rights = thin(self.right.ladder((inner, shape[1])), RUNGS)
        return [Product(left, right) for left, right in itertools.product(lefts, rights)]

    def build(self, shape: Shape, *, dtype: torch.dtype | None = None, device: str | None = None) -> ProductMatrix:
        check_shape(shape, self)
        inner = self._closed_inner(shape)
        left = self.left.build((shape[0], inner), dtype=dtype, device=device)
        return ProductMatrix(left, self.right.build((inner, shape[1]), dtype=dtype, device=device), self)

    def _closed_inner(self, shape: Shape) -> int:
        inner = self._inner_if_closed(shape)
        if inner is None:
            raise ValueError(f"{self}: the width inside the product is open; give one, or a budget that decides it")
        return inner

    def fit(
        self, matrix: Float[Tensor, "out in"], weighting: Weighting = PLAIN, *, dtype: torch.dtype | None = None
    ) -> ProductMatrix:
        out, in_ = matrix.shape
        dtype = dtype or matrix.dtype
        inner = self._closed_inner((out, in_))
        dtype, W = dtype or matrix.dtype, matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        noise = torch.finfo(dtype).eps ** 0.5  # what rounding adds to a stored factor is not amplified
        X, Y = _start(W, inner, weighting)
        best, before, energy = None, float("inf"), weighting.norm2(W)
        for _ in range(SWEEPS):
            right = self.right.fit(Y, weighting.through_left(X), dtype=dtype)
            Y = right.dense().detach().to(W.dtype)
            target = weighted_lstsq_left(Y, W, weighting, X, noise).to(W.dtype)
            left = self.left.fit(target, weighting.through_right(Y), dtype=dtype)
            X = left.dense().detach().to(W.dtype)
            error = weighting.norm2(W - X @ Y)
            if best is None or error < before:
                best = (left, right)
            if _settled(before, error, energy):
                break
            before = error
            Y = weighted_lstsq_right(X, W, weighting, Y, noise).to(W.dtype)
        assert best is not None
        return ProductMatrix(*best, self)


def _settled(before: float, error: float, energy: float) -> bool:
    """Whether the last sweep gained little of what is left, or what is left is next to nothing."""
    return before - error <= SETTLED * max(error, SETTLED * energy)


def _start(W: Float[Tensor, "out in"], inner: int, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """Factors to start from: the weighted truncated SVD, or where the inside is wider, the matrix and an identity."""
    out, in_ = W.shape
    if inner == in_ and inner != out:
        return W, torch.eye(in_, dtype=W.dtype, device=W.device)
    if inner >= out:
        eye = torch.eye(out, inner, dtype=W.dtype, device=W.device)
        return eye, torch.nn.functional.pad(W, (0, 0, 0, inner - out))
    A = weighting.apply(W)
    U, S, *_ = truncated_svd(A, min(inner, *A.shape))
    root = torch.where(S > 0, S, 1.0).sqrt()
    X, Y = weighting.unapply_left(U * root), (U / root).T @ weighting.left.times(W.T).T
    pad = inner - X.shape[1]
    return torch.nn.functional.pad(X, (0, pad)), torch.nn.functional.pad(Y, (0, 0, 0, pad))


def thin(rungs: list[Form], count: int) -> list[Form]:
    """At most `count` rungs, evenly chosen, both ends included."""
    if len(rungs) <= count:
        return rungs
    return [rungs[round(i * (len(rungs) - 1) / (count - 1))] for i in range(count)]
