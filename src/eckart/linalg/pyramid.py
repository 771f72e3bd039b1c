"""The pyramid lattice: integer points whose absolute values add up to K, as codewords with numbers of their own.

Fischer, A pyramid vector quantizer, IEEE Transactions on Information Theory, 1986.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from eckart.linalg.constants import constant

MOST_PULSES = 255
MOST_BITS = 62
"""Of a codeword's number, which is kept in 64 signed bits."""


@functools.cache
def counts(dimension: int, pulses: int) -> tuple[tuple[int, ...], ...]:
    """N(d, k), the number of points of d integers whose absolute values add up to k, for all d and k up to these."""
    table = [(1, *(0 for _ in range(pulses)))]
    for _ in range(dimension):
        row = [1]
        for k in range(1, pulses + 1):
            row.append(table[-1][k] + table[-1][k - 1] + row[k - 1])
        table.append(tuple(row))
    return tuple(table)


def index_bits(dimension: int, pulses: int) -> int:
    """Bits that number all points."""
    return (counts(dimension, pulses)[dimension][pulses] - 1).bit_length()


@constant
def _tables(dimension: int, pulses: int) -> tuple[Int[Tensor, "d k"], Int[Tensor, "d k m"]]:
    """N(d, k), and of the points of d integers and k pulses those whose first is smaller than m in size."""
    if index_bits(dimension, pulses) > MOST_BITS:
        raise ValueError(f"the pyramid of {dimension} integers and {pulses} pulses has more than 2^{MOST_BITS} points")
    N = torch.tensor(counts(dimension, pulses), dtype=torch.int64)
    below = torch.full((dimension + 1, pulses + 1, pulses + 2), torch.iinfo(torch.int64).max)
    for k in range(pulses + 1):
        sizes = N[:-1, : k + 1].flip(1)  # of the rest, when the first takes 0, 1, ..., k
        sizes = torch.cat([sizes[:, :1], 2 * sizes[:, 1:]], 1)
        below[1:, k, : k + 1] = sizes.cumsum(1) - sizes
    return N, below


def nearest_point(x: Float[Tensor, "*batch d"], pulses: int) -> Int[Tensor, "*batch d"]:
    """A point whose direction is near that of x; on the first axis for x = 0.

    x is scaled down to whole numbers, and the pulses left over go one by one where they turn it most towards x.
    """
    size = x.abs()
    size = torch.where(size.amax(-1, keepdim=True) > 0, size, torch.eye(x.shape[-1]).to(x)[0])
    y = (size * (pulses / size.sum(-1, keepdim=True))).floor()
    left = pulses - y.sum(-1)
    for _ in range(int(left.max()) if left.numel() else 0):
        dot, square = (size * y).sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
        gain = (dot + size).square() / (square + 2 * y + 1)
        best = gain.argmax(-1, keepdim=True)
        y.scatter_add_(-1, best, (left > 0).to(y)[..., None])
        left = left - 1
    return torch.where(x < 0, -y, y).to(torch.int64)


def index_of(y: Int[Tensor, "*batch d"], pulses: int) -> Int[Tensor, "*batch"]:
    """The number of each point: by its first integer in the order 0, 1, -1, 2, -2, ..., then by the others."""
    dimension = y.shape[-1]
    N, below = (t.to(y.device) for t in _tables(dimension, pulses))
    found, left = torch.zeros_like(y[..., 0]), torch.full_like(y[..., 0], pulses)
    for i in range(dimension):
        size, d = y[..., i].abs(), dimension - i
        found = found + below[d][left, size] + torch.where(y[..., i] < 0, N[d - 1][left - size], 0)
        left = left - size
    return found


def point_of(index: Int[Tensor, "*batch"], dimension: int, pulses: int) -> Int[Tensor, "*batch d"]:
    """The point of each number; of numbers that no point has, some integers."""
    N, below = (t.to(index.device) for t in _tables(dimension, pulses))
    left, found = torch.full_like(index, pulses), []
    for i in range(dimension):
        d = dimension - i
        size = torch.searchsorted(below[d][left], index[..., None], right=True)[..., 0] - 1
        index = index - below[d][left, size]
        left = left - size
        negative = (size > 0) & (index >= N[d - 1][left])
        index = index - torch.where(negative, N[d - 1][left], 0)
        found.append(torch.where(negative, -size, size))
    return torch.stack(found, -1)
