"""MoDeGPT's sparsities: their mean, their cap, their order, and the blocks they go to."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.allocation import BudgetError, Entropy, Problem
from eckart.allocation.entropy import sparsities
from eckart.forms import Curve, Dense

INFLUENCE = [0.6, 0.05, 0.1, 0.2, 0.12, 0.3]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.floats(0, 1),
    st.sampled_from([0.02, 0.1, 1.0, 50.0]),
    st.sampled_from([0.3, 0.8, 1.0]),
)
@settings(deadline=None, max_examples=80)
def test_the_mean_is_what_was_asked_for_and_none_is_above_the_cap(
    influence: list[float], share: float, temperature: float, cap: float
) -> None:
    phi = sparsities(influence, share * cap, temperature, cap)
    assert sum(phi) / len(phi) == pytest.approx(share * cap, abs=1e-6)
    assert all(-1e-12 <= p <= cap + 1e-9 for p in phi)
    by_influence = sorted(range(len(phi)), key=influence.__getitem__)
    assert all(phi[a] >= phi[b] - 1e-9 for a, b in pairwise(by_influence))


def test_without_a_cap_it_is_the_softmax() -> None:
    phi = sparsities(INFLUENCE, 0.1, 0.5, cap=1.0)
    wanted = len(INFLUENCE) * 0.1 * torch.softmax(-torch.tensor(INFLUENCE, dtype=torch.float64) / 0.5, 0)
    assert phi == pytest.approx(wanted.tolist())


def test_it_maximises_what_is_kept_plus_entropy() -> None:
    """sum s (1 - phi) + temperature * entropy(phi) under the mean: no small move that keeps the mean gains."""
    s, temperature = torch.tensor(INFLUENCE, dtype=torch.float64), 0.5
    phi = torch.tensor(sparsities(INFLUENCE, 0.1, temperature, cap=1.0), dtype=torch.float64)

    def objective(p: torch.Tensor) -> float:
        return float((s * (1 - p)).sum() - temperature * (p * p.log()).sum())

    for i, j in ((0, 1), (2, 5), (4, 3)):
        for step in (1e-3, -1e-3):
            moved = phi.clone()
            moved[i], moved[j] = moved[i] + step, moved[j] - step
            assert objective(moved) < objective(phi)


def test_a_higher_temperature_is_flatter() -> None:
    spreads = [max(phi) - min(phi) for phi in (sparsities(INFLUENCE, 0.3, t) for t in (0.05, 0.2, 1.0, 10.0))]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.02


@pytest.mark.parametrize("mean", [-0.1, 0.81, 1.0])
def test_an_impossible_mean_is_refused(mean: float) -> None:
    with pytest.raises(ValueError, match=r"is not between 0 and the cap of 0\.8"):
        sparsities(INFLUENCE, mean, 0.1)


def problem(share: float, influence: list[float]) -> Problem:
    """Two weights of 1000 bytes in each of six blocks, and one outside of them."""
    curve = Curve([Dense()] * 1000, list(range(1, 1001)), [float(1000 - i) for i in range(1, 1001)], 1000.0)
    blocks = {f"{part}{i}": i for i in range(6) for part in ("up", "down")}
    return Problem(dict.fromkeys([*blocks, "head"], curve), int(share * 13_000), blocks, influence)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_blocks_of_little_influence_lose_most(share: float) -> None:
    found = problem(share, INFLUENCE)
    choice = Entropy().choose(found)
    lost = [1 - found.curves["up0"].nbytes[choice[f"up{i}"]] / 1000 for i in range(6)]
    by_influence = sorted(range(6), key=INFLUENCE.__getitem__)
    assert [lost[i] for i in by_influence] == sorted(lost, reverse=True)
    assert all(choice[f"up{i}"] == choice[f"down{i}"] for i in range(6))
    assert choice["head"] == 999
    assert max(lost) <= 0.8 + 2e-3
    # every byte of the budget but the rounding of twelve weights
    assert found.budget - 13 <= found.nbytes(choice) <= found.budget


def test_without_influence_there_is_nothing_to_go_by() -> None:
    with pytest.raises(ValueError, match="entropy allocation needs the influence of the blocks: calibrate on data"):
        Entropy().choose(problem(0.5, []))


def test_beyond_the_cap_there_is_no_choice() -> None:
    with pytest.raises(BudgetError, match=r"entropy\(\) spent \d+ bytes of \d+"):
        Entropy().choose(problem(0.2, INFLUENCE))
