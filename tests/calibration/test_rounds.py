"""Orders of batches that are used more than once."""

from __future__ import annotations

from itertools import islice

import torch

from eckart.calibration.rounds import rounds


def test_every_round_has_all_in_an_order_of_its_own() -> None:
    found = list(islice(rounds(9, torch.Generator().manual_seed(3)), 27))
    parts = [tuple(found[i : i + 9]) for i in (0, 9, 18)]
    assert all(sorted(part) == list(range(9)) for part in parts)
    assert len(set(parts)) == 3


def test_the_same_seed_gives_the_same_order() -> None:
    first, second = (list(islice(rounds(9, torch.Generator().manual_seed(3)), 20)) for _ in range(2))
    assert first == second


def test_of_nothing_there_are_none() -> None:
    assert list(rounds(0, torch.Generator())) == []
