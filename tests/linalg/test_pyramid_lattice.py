"""The pyramid lattice against counting all of its points."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from eckart.linalg.pyramid import counts, index_bits, index_of, nearest_point, point_of
from eckart.testing import gaussian


def every_point(d: int, k: int) -> list[tuple[int, ...]]:
    return [y for y in itertools.product(range(-k, k + 1), repeat=d) if sum(map(abs, y)) == k]


def closed_form(d: int, k: int) -> int:
    return sum(2**i * math.comb(d, i) * math.comb(k - 1, i - 1) for i in range(1, min(d, k) + 1))


def test_counts_are_the_closed_form_and_brute_force() -> None:
    for d in range(1, 8):
        for k in range(1, 9):
            assert counts(d, k)[d][k] == closed_form(d, k)
            if (2 * k + 1) ** d < 20_000:
                assert counts(d, k)[d][k] == len(every_point(d, k))


@pytest.mark.parametrize(("d", "k"), [(1, 3), (2, 1), (3, 4), (4, 5), (5, 3)])
def test_numbers_enumerate_exactly_the_points(d: int, k: int) -> None:
    total = counts(d, k)[d][k]
    points = point_of(torch.arange(total), d, k)
    assert sorted(map(tuple, points.tolist())) == sorted(every_point(d, k))
    assert torch.equal(index_of(points, k), torch.arange(total))
    assert index_bits(d, k) == math.ceil(math.log2(total))


def test_large_numbers_come_back() -> None:
    y = nearest_point(gaussian(200, 16), 32)
    index = index_of(y, 32)
    assert bool((index >= 0).all())
    assert bool((index < counts(16, 32)[16][32]).all())
    assert torch.equal(point_of(index, 16, 32), y)
    with pytest.raises(ValueError, match="more than 2"):
        index_of(nearest_point(gaussian(2, 32), 48), 48)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    return torch.cosine_similarity(x.double(), y.double(), dim=-1)


def test_directions_are_near_the_best() -> None:
    x = gaussian(500, 4)
    all_points = torch.tensor(every_point(4, 5))
    best = cosine(x[:, None], all_points[None]).amax(1)
    found = nearest_point(x, 5)
    assert bool((found.abs().sum(-1) == 5).all())
    hits = cosine(x, found) >= best - 1e-9
    assert float(hits.float().mean()) > 0.9
    size = x.abs() * 5 / x.abs().sum(-1, keepdim=True)
    floor = size.floor()
    ranks = (size - floor).argsort(descending=True).argsort()
    by_fraction = (floor + (ranks < (5 - floor.sum(-1, keepdim=True)))) * x.sign()
    assert float(cosine(x, found).mean()) >= float(cosine(x, by_fraction).mean())


def test_more_pulses_are_nearer_and_zero_is_fixed() -> None:
    x = gaussian(300, 16)
    similar = [float(cosine(x, nearest_point(x, k)).mean()) for k in (1, 2, 4, 8, 16, 32)]
    assert similar == sorted(similar)
    assert nearest_point(torch.zeros(2, 3), 4).tolist() == [[4, 0, 0], [4, 0, 0]]
