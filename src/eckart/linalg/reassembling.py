"""Which channels of a matrix's inputs to split, and which to merge so that there are as many as before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MOST = 10_000
"""Thresholds that are looked at, however large activations are."""


class Channels(NamedTuple):
    """`split[k]` becomes `copies[k]` channels, `merged[k]` goes into `into[k]`."""

    split: list[int]
    copies: list[int]
    merged: list[int]
    into: list[int]


def candidates(
    x: Float[Tensor, "rows in"], W: Float[Tensor, "out in"], ratio: float, thresholds: int = 100
) -> Iterator[tuple[float, Channels | None]]:
    """Thresholds from the largest activation down, each with what it makes of the channels (QLLM, section 4.2).

    Channel i becomes ceil(max |x_i| / threshold) parts; the first candidate splits none and is None. Thresholds that
    add as many channels as the one before are skipped. It ends where more than `ratio` of all would be added, or not
    enough can be merged.

    Args:
        x: inputs.
        W: all matrices that multiply them, one upon the other.
        thresholds: how many evenly spaced ones there are; where the largest activation is above half their number, so
            many, up to 10,000, that they are at most 1/2 apart.
    """
    top = x.abs().amax(0).double() if len(x) else x.new_zeros(x.shape[1])
    high, low = (float(top.max()), float(top.min())) if len(top) else (0.0, 0.0)
    yield high, None
    errors = pair_errors(x, W)
    known, most = 0, ratio * len(top)
    steps = max(thresholds, math.ceil(min(high / 0.5, MOST)))
    for threshold in torch.linspace(high, low, steps, dtype=torch.float64).tolist():
        if threshold <= 0:
            return
        copies = (top / threshold).ceil().clamp_min(1)
        added = int(copies.sum()) - len(top)
        if added == known:
            continue
        pairs = merges(errors, copies == 1, added) if added <= most else None
        if pairs is None:
            return
        known, split = added, (copies > 1).nonzero()[:, 0]
        yield threshold, Channels(split.tolist(), copies[split].long().tolist(), *pairs)


def pair_errors(x: Float[Tensor, "rows in"], W: Float[Tensor, "out in"]) -> Float[Tensor, "even odd"]:
    """Squared error of W x, summed over rows, where an even and an odd channel are merged: |Δx|² |Δw|² / 4.

    Both get the mean of their activations and the sum of their columns; in float64.
    """
    return _distances(x.double()) * _distances(W.double()) / 4


def _distances(A: Float[Tensor, "n in"]) -> Float[Tensor, "even odd"]:
    """|a_i - a_j|² of all even and odd columns."""
    even, odd = A[:, ::2], A[:, 1::2]
    apart = even.square().sum(0)[:, None] + odd.square().sum(0) - 2 * even.T @ odd
    return apart.clamp_min(0)


def merges(
    errors: Float[Tensor, "even odd"], free: Bool[Tensor, " in"], count: int
) -> tuple[list[int], list[int]] | None:
    """So many even channels and the odd ones that each goes into best; only free ones; None where they are too few.

    Bipartite soft matching: several may go into one.
    """
    allowed = errors.masked_fill(~(free[::2, None] & free[1::2]), torch.inf)
    if not allowed.numel():
        return None
    error, partner = allowed.min(1)
    order = error.sort(stable=True).indices[:count]
    if len(order) < count or not bool(torch.isfinite(error[order]).all()):
        return None
    order = order.sort().values
    return (2 * order).tolist(), (2 * partner[order] + 1).tolist()
