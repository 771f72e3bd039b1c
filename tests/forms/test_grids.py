"""Which numbers codes stand for."""

from __future__ import annotations

import pytest
import torch

from eckart.forms.grids import GRIDS, Grid, Uniform
from eckart.forms.levels import Learned, NormalFloat, Shift, normal_float
from eckart.testing import error_ratio, gaussian

ALL: list[Grid] = [
    Uniform(), Uniform(symmetric=True), Uniform(zero="real"), Uniform(search=10), Uniform(zero="real", search=10),
    NormalFloat(), Shift(), Learned(),
]  # fmt: skip
grids = pytest.mark.parametrize("grid", ALL, ids=str)

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
"""As bitsandbytes publishes it."""


def rounded(grid: Grid, x: torch.Tensor, bits: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    p = grid.fit(x, bits, weight)
    return grid.decode(grid.encode(x, p, bits), p, bits)


def test_normal_float_is_the_published_table() -> None:
    assert normal_float(4).tolist() == pytest.approx(NF4, abs=1e-6)
    for bits in range(2, 9):
        levels = normal_float(bits)
        assert len(levels) == 2**bits
        assert bool((levels.diff() > 0).all())
        assert int((levels == 0).sum()) == 1
        assert int((levels > 0).sum()) == 2 ** (bits - 1)


@grids
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_encode_finds_the_nearest_number(grid: Grid, bits: int) -> None:
    x = gaussian(3, 4, 17, dtype=torch.float64)
    p = grid.fit(x, bits)
    every = torch.arange(2**bits, dtype=torch.uint8).expand(3, 4, -1)
    numbers = grid.decode(every, p, bits)
    least = (x[..., None] - numbers[..., None, :]).abs().amin(-1)
    found = (x - grid.decode(grid.encode(x, p, bits), p, bits)).abs()
    assert torch.allclose(found, least, atol=1e-12)


@grids
def test_numbers_are_linear_in_the_floating_point_parameters(grid: Grid) -> None:
    x = gaussian(3, 4, 17, dtype=torch.float64)
    p = grid.fit(x, 3)
    codes = grid.encode(x, p, 3)
    design = grid.design(codes, p, 3)
    assert design.keys() == {name for name, slot in grid.slots(3).items() if slot.bits is None}
    found = sum((d * p[name][..., None, :]).sum(-1) for name, d in design.items())
    assert error_ratio(found, grid.decode(codes, p, 3)) <= 1e-12


@grids
@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_constant_groups_come_back(grid: Grid, value: float) -> None:
    x = torch.full((2, 3, 9), value)
    assert torch.allclose(rounded(grid, x, 3), x, atol=1e-6)


@grids
def test_what_weighs_nothing_is_not_reached_for(grid: Grid) -> None:
    x = gaussian(5, 33)
    x[:, 7] = 50.0
    weight = torch.ones_like(x)
    weight[:, 7] = 0
    kept = torch.arange(33) != 7
    with_it, without = rounded(grid, x, 4), rounded(grid, x, 4, weight)
    alone = rounded(grid, x[:, kept], 4)
    assert torch.allclose(without[:, kept], alone, atol=1e-5)
    if isinstance(grid, Uniform | NormalFloat):
        assert float((alone - x[:, kept]).square().sum()) < 0.2 * float((with_it - x)[:, kept].square().sum())


@pytest.mark.parametrize("zero", ["integer", "real"])
def test_a_search_never_loses(zero: str) -> None:
    x, weight = gaussian(20, 64, seed=1) ** 3, gaussian(20, 64, seed=2).square()
    plain, searched = (rounded(Uniform(zero=zero, search=s), x, 2, weight) for s in (0, 30))
    lost = [(weight * (x - found).square()).sum(1) for found in (plain, searched)]
    assert bool((lost[1] <= lost[0]).all())
    assert float(lost[1].sum()) < 0.8 * float(lost[0].sum())


def test_ends_of_the_range_are_on_the_grid() -> None:
    x = gaussian(6, 40, dtype=torch.float64)
    real = rounded(Uniform(zero="real"), x, 3)
    assert torch.allclose(real.amin(1), x.amin(1))
    assert torch.allclose(real.amax(1), x.amax(1))
    integer = Uniform()
    p = integer.fit(x, 3)
    zero = integer.encode(torch.zeros(6, 1, dtype=torch.float64), p, 3)
    assert bool((integer.decode(zero, p, 3) == 0).all())


def test_shifts_are_powers_of_two() -> None:
    assert Shift().levels(3).tolist() == [-1, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5, 1]


def test_learned_is_better_than_any_list() -> None:
    x = gaussian(30, 200, seed=3) ** 3
    lost = [float((x - rounded(grid, x, 3)).square().sum()) for grid in (Learned(), NormalFloat(), Uniform())]
    assert lost[0] < 0.5 * min(lost[1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform(zero='half')", "it is 'integer' or 'real'"),
        ("uniform(search=-1)", "0 or more"),
        ("uniform(zeros='real')", "no setting 'zeros'"),
        ("unifrom()", "did you mean 'uniform'"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRIDS.parse(text)
