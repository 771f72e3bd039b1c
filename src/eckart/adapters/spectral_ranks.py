"""Ranks for a set of matrices of which all hold the same share of their spectrum."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor


def ranks_at_one_energy(spectra: Mapping[str, Float[Tensor, " m"]], mean: int) -> dict[str, int]:
    """layer -> the least rank at which it holds one share of its squared spectrum, common to all (LaMDA++).

    The share is the one at which ranks, bounded by half the mean and twice it, have exactly that mean: as it rises,
    the layer that holds least is always the next to get one more. Raises `ValueError` where the mean itself is no rank
    of a layer.

    Args:
        spectra: singular values, descending.
    """
    ranks: dict[str, int] = {}
    energies: dict[str, Tensor] = {}
    for name, values in spectra.items():
        if mean > len(values):
            raise ValueError(f"{name}: a mean rank of {mean} is more than its {len(values)} singular values: lower it to {len(values)} or leave the layer out")  # fmt: skip # noqa: E501
        squares = values.double().square()
        energies[name] = squares.cumsum(0) / squares.sum().clamp_min(1e-300)
        ranks[name] = max(1, mean // 2)
    queue = [(float(energies[name][rank - 1]), name) for name, rank in ranks.items()]
    heapq.heapify(queue)
    for _ in range(mean * len(ranks) - sum(ranks.values())):
        _, name = heapq.heappop(queue)
        ranks[name] += 1
        if ranks[name] < min(2 * mean, len(spectra[name])):
            heapq.heappush(queue, (float(energies[name][ranks[name] - 1]), name))
    return ranks
