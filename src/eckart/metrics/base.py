"""What every metric owes: what it needs to have been summed, and the weights it makes of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.forms.language import Vocabulary
from eckart.linalg.weighting import Weighting
from eckart.metrics.statistics import Statistics

METRICS: Vocabulary[Metric] = Vocabulary("metric")


@dataclass(frozen=True)
class Metric(ABC):
    """Which error counts. Hashable, printable, parsed back by `METRICS.parse`.

    Attributes:
        needs: names of the sums in `Statistics` that it is made of; empty for data-free metrics.
        labels: where the backward pass takes its targets from: the text, or the model's own predictions (sampled).
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    labels: ClassVar[str] = "data"

    def __str__(self) -> str:
        return METRICS.print(self)

    @abstractmethod
    def weighting(self, statistics: Statistics, where: str = "") -> Weighting:
        """The norm it puts on the error of a matrix with these statistics. `where` names the layer in messages."""

    def of(self, x: Float[Tensor, "*batch in"], where: str = "") -> Weighting:
        """The norm from samples of the input, for matrices outside any model."""
        statistics = Statistics()
        statistics.add_inputs(x, self.needs)
        return self.weighting(statistics, where)


def as_metric(metric: Metric | str) -> Metric:
    """A metric, from itself or from its text."""
    return metric if isinstance(metric, Metric) else METRICS.parse(metric)


def covariance(statistics: Statistics, centred: bool, where: str) -> tuple[Tensor, Tensor | None]:
    """Second moment of the inputs about zero or about their mean, float64, and that mean.

    Inputs that do not vary beyond the rounding of their float32 products have a covariance of zero.
    """
    second = statistics.mean("outer", where, torch.float64)
    if not centred:
        return second, None
    mean = statistics.mean("x", where).double()
    C = second - torch.outer(mean, mean)
    constant = bool(C.diagonal().mean() <= 1e-6 * second.diagonal().mean())
    return torch.zeros_like(C) if constant else C, mean
