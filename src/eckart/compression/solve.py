"""The work on one layer, as pure functions of tensors: what a pool of workers is given."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms import Curve, Dense, Factored, Form, parse
from eckart.linalg.whitening import Damped, check_finite
from eckart.metrics import Metric, Statistics

T = TypeVar("T")
R = TypeVar("R")


class Executor(Protocol):
    """Maps a pure function over tasks, in order."""

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]: ...


class Serial:
    """One after the other, in this process."""

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        return map(function, tasks)


@dataclass(frozen=True)
class Task:
    """One matrix to work on.

    Attributes:
        name: of the layer, for messages.
        matrix: (out, in).
        form: open (for a curve) or closed (for a fit), as text.
        metric: the metric.
        statistics: of the layer.
        dtype: in which the numbers will be stored.
    """

    name: str
    matrix: Float[Tensor, "out in"]
    form: str
    metric: Metric
    statistics: Statistics
    dtype: torch.dtype


@dataclass(frozen=True)
class Fitted:
    """A fitted matrix: its module, the shift of the bias that the metric asks for, and its error."""

    module: Factored
    bias_shift: Float[Tensor, " out"] | None
    error: float
    note: str | None


SMALL = 1024
"""Matrices whose smaller side is at most this are worked on by one thread: more are slower on a busy machine."""


@contextmanager
def threads_for(matrix: Float[Tensor, "out in"]) -> Iterator[None]:
    """Within the context, torch uses as many threads as pay for a matrix of this shape."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if min(matrix.shape, default=0) <= SMALL else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def curve(task: Task) -> tuple[Curve, str | None]:
    """The curve of an open form on one matrix, its last point the matrix left dense; and a note."""
    with threads_for(task.matrix), noting() as notes:
        check_finite(task.matrix, f"the weight of {task.name}")
        weighting = task.metric.weighting(task.statistics, task.name)
        found = parse(task.form).curve(task.matrix, weighting, task.dtype)
    out, in_ = task.matrix.shape
    dense = out * in_ * task.dtype.itemsize
    keep = [i for i, n in enumerate(found.nbytes) if n < dense]
    forms: list[Form] = [found.forms[i] for i in keep]
    return replace(
        found,
        forms=[*forms, Dense()],
        nbytes=[*(found.nbytes[i] for i in keep), dense],
        errors=[*(found.errors[i] for i in keep), 0.0],
    ), notes.text


def fit(task: Task) -> Fitted:
    """A closed form fitted to one matrix."""
    with threads_for(task.matrix), noting() as notes:
        check_finite(task.matrix, f"the weight of {task.name}")
        weighting = task.metric.weighting(task.statistics, task.name)
        module = parse(task.form).fit(task.matrix, weighting, dtype=task.dtype)
    if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
        raise ValueError(f"{task.name}: the factors of {task.form} do not fit into {task.dtype}: keep the layer dense")
    difference = task.matrix - module.dense().detach().to(task.matrix.dtype)
    with threads_for(task.matrix):
        error = weighting.norm2(difference)
    shift = None if weighting.mean is None else (difference.double() @ weighting.mean).float()
    return Fitted(module, shift, error, notes.text)


class noting:
    """Collects `Damped` warnings as a note; lets all others pass."""

    text: str | None = None

    def __enter__(self) -> noting:
        self._catch = warnings.catch_warnings(record=True)
        caught = self._catch.__enter__()
        self._caught: list[Any] = [] if caught is None else caught
        warnings.simplefilter("always")
        return self

    def __exit__(self, *exc: Any) -> None:
        self._catch.__exit__(*exc)
        for caught in self._caught:
            if not issubclass(caught.category, Damped):
                warnings.warn_explicit(caught.message, caught.category, caught.filename, caught.lineno)
        damped = [str(c.message) for c in self._caught if issubclass(c.category, Damped)]
        self.text = "; ".join(dict.fromkeys(damped)) or None
