"""n of every m: the numbers of choices, round trips, bytes, short groups, damaged codes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from eckart.forms import SemiSparse
from eckart.forms.places import Choices, choice_of, code_bits, number_of
from eckart.testing import gaussian


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 4), (4, 4), (3, 7), (4, 8)])
def test_every_choice_has_a_number_of_its_own(n: int, m: int) -> None:
    masks = torch.tensor([[p in chosen for p in range(m)] for chosen in itertools.combinations(range(m), n)])
    numbers = number_of(masks)
    assert sorted(numbers.tolist()) == list(range(math.comb(m, n)))
    assert torch.equal(choice_of(numbers, n, m), masks)


def test_the_widest_groups() -> None:
    scores = gaussian(50, 64)
    mask = scores >= scores.sort(dim=1, descending=True).values[:, 31:32]
    assert torch.equal(choice_of(number_of(mask), 32, 64), mask)
    assert code_bits(32, 64) == 61


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 7), (8, 32), (5, 5)])
@pytest.mark.parametrize("width", [1, 3, 8, 14, 33, 70])
def test_round_trip_and_bytes_to_the_bit(n: int, m: int, width: int) -> None:
    W, form = gaussian(6, width), SemiSparse(n, m)
    module = form.fit(W, dtype=torch.float16)
    dense = module.dense().detach()
    for start in range(0, width, m):
        here, w = dense[:, start : start + m], W[:, start : start + m].half()
        kept = min(n, here.shape[1])
        assert torch.equal((here != 0).sum(1), torch.full((6,), kept))
        largest = w.abs().sort(dim=1, descending=True).values[:, :kept]
        assert torch.equal(here.abs().sort(dim=1, descending=True).values[:, :kept], largest)
    whole, short = divmod(width, m)
    bits = whole * math.ceil(math.log2(math.comb(m, n))) + math.ceil(math.log2(math.comb(short, min(n, short))))
    values = 6 * (whole * n + min(n, short))
    assert module.nbytes == form.nbytes((6, width), torch.float16) == 2 * values + 6 * math.ceil(bits / 8)


def test_two_of_four_take_three_bits() -> None:
    assert SemiSparse().nbytes((16, 64), torch.bfloat16) == 16 * 64 // 2 * 2 + 16 * 64 // 4 * 3 // 8


def test_damaged_codes_are_refused() -> None:
    module = SemiSparse().fit(gaussian(2, 8))
    module.codes[1, 0] = 0b111  # there are six ways to choose two of four
    with pytest.raises(ValueError, match="2 of 4 places in a way that does not exist"):
        module.dense()


def test_what_is_stored_is_what_is_chosen() -> None:
    place = Choices.of(3, 10, 2, 4)
    mask = SemiSparse().fit(gaussian(3, 10)).dense() != 0
    assert torch.equal(place.decode(place.encode(mask)), mask.flatten().nonzero()[:, 0])


def test_an_open_n_is_a_dial() -> None:
    assert SemiSparse(None, 4).ladder((8, 8)) == [SemiSparse(1, 4), SemiSparse(2, 4), SemiSparse(3, 4)]
    with pytest.raises(ValueError, match="has no n yet"):
        SemiSparse(None).build((4, 4))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (2, 0), (2, 65), ("two", 4)])
def test_refused(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="semi_sparse"):
        SemiSparse(n, m)
