"""The work on one layer, as pure functions of tensors: what a pool of workers is given."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms import Curve, Dense, Factored, Form, parse
from eckart.linalg.whitening import check_finite
from eckart.metrics import Metric, Statistics
from eckart.remarks import noting

R = TypeVar("R")


class Executor(Protocol):
    """Maps a pure function over tasks, in order."""

    def map(self, function: Callable[[Task], R], tasks: Iterable[Task]) -> Iterator[R]: ...


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

    @property
    def small(self) -> bool:
        return min(self.matrix.shape, default=0) <= SMALL


@dataclass(frozen=True)
class Fitted:
    """A fitted matrix: its module, the shift of the bias that the metric asks for, and its error."""

    module: Factored
    bias_shift: Float[Tensor, " out"] | None
    error: float
    note: str | None


SMALL = 1024
"""Matrices whose smaller side is at most this are worked on by one thread: more are slower on a busy machine."""


class Threads:
    """Maps tasks over the cores of this machine: small matrices side by side, large ones alone and with all cores.

    The last bits of a matrix product depend on the number of threads, so that depends on nothing but the shape (and on
    torch's own setting for large ones).
    """

    def __init__(self, workers: int | None = None):
        self.workers = workers or torch.get_num_threads()

    def map(self, function: Callable[[Task], R], tasks: Iterable[Task]) -> Iterator[R]:
        pending: deque[Future[R]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            for task in tasks:
                while pending and (len(pending) > self.workers or not task.small):
                    yield pending.popleft().result()
                if task.small:
                    pending.append(pool.submit(alone, function, task))
                else:
                    yield function(task)
            while pending:
                yield pending.popleft().result()


def alone(function: Callable[[Task], R], task: Task) -> R:
    """Work on a task with one thread if it is small, and without gradients, which are on in every new thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if task.small else before)
    try:
        with torch.no_grad():
            return function(task)
    finally:
        torch.set_num_threads(before)


def curve(task: Task) -> tuple[Curve, str | None]:
    """The curve of an open form on one matrix, its last point the matrix left dense; and a note."""
    with noting() as notes:
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
    with noting() as notes:
        check_finite(task.matrix, f"the weight of {task.name}")
        weighting = task.metric.weighting(task.statistics, task.name)
        module = parse(task.form).fit(task.matrix, weighting, dtype=task.dtype)
    if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
        raise ValueError(f"{task.name}: the factors of {task.form} do not fit into {task.dtype}: keep the layer dense")
    difference = task.matrix - module.dense().detach().to(task.matrix.dtype)
    error = weighting.norm2(difference)
    shift = None if weighting.mean is None else (difference.double() @ weighting.mean).float()
    return Fitted(module, shift, error, notes.text)
