"""Experts of a mixture that put out alike, in clusters; and how many clusters each layer gets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from eckart.allocation.dynamic_programming import knapsack
from eckart.linalg.kmeans import kmeans
from eckart.linalg.whitening import psd_root

STARTS, STEPS, SETTLED = 4, 100, 1e-9
"""Of k-means: how many starts the best is taken of, most iterations, and the gain at which they end."""


class Clustering(NamedTuple):
    """Which merged expert each expert becomes, and the squared distances of unit outputs from their clusters' means."""

    labels: list[int]
    error: float


def cluster_all(
    similarity: Float[Tensor, "n n"], least: int, seed: int, name: str = "experts"
) -> dict[int, Clustering]:
    """Clusterings of experts into every number of clusters from `least` up; more clusters never cost more.

    k-means on outputs of unit length needs the inner products alone, which are the cosines.
    """
    root = psd_root(similarity, 0.0, "eigen", f"the outputs of {name}")
    points = root.times(torch.eye(len(similarity), dtype=torch.float64, device=similarity.device))
    found: dict[int, Clustering] = {}
    for k in range(least, len(points) + 1):
        starts = 1 if k == len(points) else STARTS
        runs = [kmeans(points, k, seed=seed + i, steps=STEPS, tolerance=SETTLED) for i in range(starts)]
        best = min(runs, key=lambda run: run.error)
        before = found.get(k - 1)
        worse = before is not None and before.error <= best.error
        found[k] = before if worse and before is not None else Clustering(_numbered(best.labels.tolist()), best.error)
    return found


def _numbered(labels: Sequence[int]) -> list[int]:
    """The same clusters, numbered in the order in which they come, without gaps."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]


def split(clusterings: Sequence[Mapping[int, Clustering]], total: int, window: int) -> list[int]:
    """How many clusters each layer gets: windows in proportion to their experts, within a window where they help most.

    Args:
        clusterings: of every layer, from its least number of clusters to as many as it has experts.
        total: clusters of all layers together.
        window: consecutive layers that share a number.
    """
    spare = [max(c) - min(c) for c in clusterings]
    left, all_spare = total - sum(min(c) for c in clusterings), max(1, sum(spare))
    if not 0 <= left <= sum(spare):
        raise ValueError(f"these layers cannot have {total} clusters")
    counts: list[int] = []
    ends = [min(i + window, len(spare)) for i in range(0, len(spare), window)]
    for start, end in itertools.pairwise([0, *ends]):
        capacity = left * sum(spare[:end]) // all_spare - left * sum(spare[:start]) // all_spare
        some = clusterings[start:end]
        costs = [np.arange(max(c) - min(c) + 1) for c in some]
        losses = [np.array([c[k].error for k in range(min(c), max(c) + 1)]) for c in some]
        counts += [min(c) + taken for c, taken in zip(some, knapsack(costs, losses, capacity), strict=True)]
    return counts
