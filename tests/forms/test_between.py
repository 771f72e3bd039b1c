"""The neighbours of every weight on a grid that is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eckart.forms import Quantized
from eckart.forms.grids import Grid, Uniform
from eckart.forms.levels import Learned, NormalFloat
from eckart.forms.quantized import Groups
from eckart.forms.roundings import Between, Stored, between
from eckart.testing import error_ratio, gaussian

OUT, IN, BITS = 6, 20, 3


def made(W: Tensor, grid: Grid, group: int | None = 8) -> tuple[Groups, Stored, Between]:
    at = Groups(Quantized(BITS, group, grid), W.shape[1], W.dtype)
    p = at.parameters(W)
    return at, p, between(W, p, at)


@pytest.mark.parametrize("grid", [Uniform(), Uniform(symmetric=True), Uniform(zero="real"), NormalFloat(), Learned(), Uniform(search=20)], ids=str)  # fmt: skip # noqa: E501
def test_the_nearest_numbers_below_and_above(grid: Grid) -> None:
    W = gaussian(OUT, IN, dtype=torch.float64)
    at, p, found = made(W, grid)
    numbers = torch.stack([at.decode(torch.full(W.shape, c, dtype=torch.uint8), p) for c in range(2**BITS)])
    least, most = numbers.amin(0), numbers.amax(0)
    inside = W.clamp(least, most) == W
    below = torch.where(numbers <= W, numbers, -torch.inf).amax(0)
    above = torch.where(numbers >= W, numbers, torch.inf).amin(0)
    low, high = at.decode(found.lower, p), at.decode(found.upper, p)
    assert bool(inside.any())
    assert torch.equal(low[inside], below[inside])
    assert torch.equal(high[inside], above[inside])
    assert torch.equal(low[~inside], W.clamp(least, most)[~inside])
    assert torch.equal(high[~inside], low[~inside])
    assert error_ratio((low + found.way * (high - low))[inside], W[inside]) <= 1e-12
    assert bool((found.way[found.lower == found.upper] == 0.5).all())
    nearest = torch.where(found.way > 0.5, found.upper, found.lower)
    apart = found.lower != found.upper
    assert torch.equal(nearest[apart], at.encode(W, p)[apart])


def test_a_weight_on_the_grid_has_one_neighbour() -> None:
    W = torch.arange(2**BITS, dtype=torch.float32).repeat(3, 2) * 0.25
    _, _, found = made(W, Uniform(), group=8)
    assert torch.equal(found.lower, found.upper)
    assert bool((found.way == 0.5).all())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    _, _, found = made(gaussian(*shape), Uniform())
    assert {tuple(t.shape) for t in found} == {shape}


def test_grids_that_do_not_belong_to_the_matrix_are_refused() -> None:
    W = gaussian(OUT, IN)
    at, p, _ = made(W, Uniform(zero="real"))
    other = Groups(Quantized(BITS, 5, Uniform(zero="real")), IN, W.dtype)
    for bad in ((W, p, other), (W[:3], p, at), (W[:, :8], p, at)):
        with pytest.raises(ValueError, match=r"the grid's scale is for \(6, 3\) rows and groups, the matrix has"):
            between(*bad)
    with pytest.raises(ValueError, match="fall as their codes rise: its scale is negative"):
        between(W, replace(p, values={**p.values, "scale": -p.values["scale"]}), at)
    with pytest.raises(ValueError, match="the grid's zero holds NaN"):
        between(W, replace(p, values={**p.values, "zero": p.values["zero"] / 0}), at)
    with pytest.raises(ValueError, match="the matrix holds NaN"):
        between(W.index_fill(0, torch.tensor([2]), torch.nan), p, at)
