"""Channels to split and to merge, against the definitions written out."""

from __future__ import annotations

import pytest
import torch

from eckart.forms.reassembly import Reassembly
from eckart.linalg.reassembling import Channels, candidates, merges, pair_errors
from eckart.testing import error_ratio, gaussian


def outlying(rows: int = 50, width: int = 32) -> torch.Tensor:
    x = gaussian(rows, width, dtype=torch.float64)
    x[:, [3, width // 2]] *= 30
    return x


def places(channels: Channels) -> list[torch.Tensor]:
    return [torch.tensor(t, dtype=torch.long) for t in channels]


@pytest.mark.parametrize("width", [32, 33])
def test_splitting_is_exact_and_keeps_every_activation_below_its_threshold(width: int) -> None:
    x, W = outlying(width=width), gaussian(9, width, seed=1, dtype=torch.float64)
    found = list(candidates(x, W, 0.45))
    assert len(found) > 5
    assert found[0] == (float(x.abs().max()), None)
    for threshold, channels in found[1:]:
        assert channels is not None
        split, copies, merged, into = places(channels)
        added = int(copies.sum()) - len(split)
        assert added == len(merged) <= 0.45 * width
        whole = Reassembly(len(split), len(merged)).at(split, copies, merged, into, (width, width), torch.float64)
        assert whole(x).shape == x.shape
        none = merged[:0]
        alone = Reassembly(len(split)).at(split, copies, none, none, (width + added, width), torch.float64)
        assert error_ratio(alone(x) @ alone.columns(W).T, x @ W.T) < 1e-12
        assert float(alone(x).abs().max()) <= threshold * (1 + 1e-12)
    assert [t for t, _ in found] == sorted((t for t, _ in found), reverse=True)
    counts = [0, *(len(c.merged) for _, c in found[1:] if c is not None)]
    assert counts == sorted(set(counts))


def test_errors_of_pairs_are_what_merging_them_does() -> None:
    x, W = gaussian(20, 7, dtype=torch.float64), gaussian(5, 7, seed=1, dtype=torch.float64)
    errors = pair_errors(x, W)
    assert errors.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            pair = Reassembly(0, 1).at(*places(Channels([], [], [2 * i], [2 * j + 1])), (6, 7), torch.float64)
            off = float((pair(x) @ pair.columns(W).T - x @ W.T).square().sum())
            assert float(errors[i, j]) == pytest.approx(off, rel=1e-8)


def test_the_least_errors_are_merged_each_even_channel_into_its_best_odd_one() -> None:
    errors = torch.tensor([[5.0, 1, 9], [2, 3, 1], [4, 4, 4], [7, 0.5, 0.1]])
    free = torch.ones(7, dtype=torch.bool)
    assert merges(errors, free, 3) == ([0, 2, 6], [3, 5, 5])
    free[5] = False
    assert merges(errors, free, 3) == ([0, 2, 6], [3, 1, 3])
    free[0] = False
    assert merges(errors, free, 3) == ([2, 4, 6], [1, 1, 3])
    assert merges(errors, free, 4) is None
    assert merges(errors, torch.zeros(7, dtype=torch.bool), 1) is None


def test_twins_are_merged_for_nothing() -> None:
    x, W = outlying(), gaussian(9, 32, seed=1, dtype=torch.float64)
    x[:, 21] = x[:, 8]
    channels = next(c for _, c in candidates(x, W, 0.4) if c is not None)
    assert dict(zip(channels.merged, channels.into, strict=True))[8] == 21


@pytest.mark.parametrize("x", [torch.zeros(4, 6), torch.zeros(0, 6), torch.ones(4, 6), torch.ones(4, 1)])
def test_nothing_to_split_is_one_candidate(x: torch.Tensor) -> None:
    assert [c for _, c in candidates(x, gaussian(3, x.shape[1]), 0.4)] == [None]


def test_channels_of_zeros_are_not_divided_by() -> None:
    x = outlying()
    x[:, [5, 6]] = 0
    found = list(candidates(x, gaussian(9, 32, seed=1), 0.45))
    assert all(c is None or {5, 6}.isdisjoint(c.split) for _, c in found)
    assert len(found) > 3


def test_however_large_activations_are_it_ends() -> None:
    found = [len(list(candidates(times * outlying(), gaussian(9, 32, seed=1), 0.45))) for times in (1e3, 1e12)]
    assert found[0] == found[1] > 3
