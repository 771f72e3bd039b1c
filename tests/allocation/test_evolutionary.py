"""Evolution against every choice, with fitnesses that add up and that do not; budgets, elitism, and being killed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from problems import brute_force, damage, problem

from eckart.allocation import Problem
from eckart.allocation.dynamic_programming import DynamicProgramming
from eckart.allocation.evolutionary import Evolutionary, Journal, NoSwitch, Stage, State, evolve

ONE = [Stage(1, 1)]


def equal_steps(weights: int, levels: int, total: int) -> Problem:
    """Ladders of equal steps, their errors falling by one a step, with room for `total` steps."""
    errors = [[float(levels - 1 - i) for i in range(levels)]] * weights
    return problem([[100 + 10 * i for i in range(levels)]] * weights, errors, 100 * weights + 10 * total)


def start(found: Problem, levels: list[int]) -> State:
    return State(dict(zip(found.curves, levels, strict=True)))


def separable(costs: np.ndarray) -> object:
    def fitness(choice: Mapping[str, int], tokens: int, draw: int) -> float:
        return float(sum(c for c, i in zip(costs, choice.values(), strict=True) if i == 0))

    return fitness


def test_finds_the_best_4_of_12_to_remove_in_as_many_generations_as_the_theory_says() -> None:
    """k (n - k) / offspring, times a small constant."""
    found = equal_steps(12, 2, 8)
    for seed in range(5):
        costs = np.random.default_rng(seed).random(12)
        best = float(np.sort(costs)[:4].sum())
        state = evolve(found, start(found, [0] * 4 + [1] * 8), separable(costs), ONE, generations=30, offspring=8, seed=seed)  # type: ignore[arg-type] # fmt: skip # noqa: E501
        assert state.loss == pytest.approx(best)


def test_the_sum_of_levels_never_changes_on_equal_steps_and_a_budget_is_never_exceeded() -> None:
    found, draw = equal_steps(9, 6, 18), np.random.default_rng(0)
    noise = draw.random((9, 6))
    sums: list[int] = []

    def fitness(choice: Mapping[str, int], tokens: int, draw: int) -> float:
        sums.append(sum(choice.values()))
        return float(sum(noise[k, i] for k, i in enumerate(choice.values())))

    evolve(found, start(found, [2] * 9), fitness, [Stage(3, 1), Stage(1, 4)], generations=20, offspring=6)
    assert set(sums) == {18}


def test_ladders_of_unequal_steps_stay_within_the_budget() -> None:
    draw = np.random.default_rng(0)
    steps = [np.cumsum(draw.integers(1, 500, 7)).tolist() for _ in range(8)]
    errors = [np.sort(draw.random(7))[::-1].tolist() for _ in range(8)]
    found = problem(steps, errors, sum(s[3] for s in steps))

    def fitness(choice: Mapping[str, int], tokens: int, draw: int) -> float:
        assert found.nbytes(choice) <= found.budget
        return damage(found, dict(choice))

    begun = start(found, [3] * 8)
    state = evolve(found, begun, fitness, ONE, generations=80, offspring=12)
    assert state.loss <= brute_force_by_tables(found) * 1.1
    assert state.loss < damage(found, begun.parent)


def brute_force_by_tables(found: Problem) -> float:
    return damage(found, DynamicProgramming("error").choose(found))


def interacting() -> Problem:
    """Six weights of three levels; what is cheap alone is dear together."""
    errors = [[2.0, 1.0 + 0.01 * k, 0.0] for k in range(6)]
    found = problem([[10, 20, 30]] * 6, errors, 120)
    names = list(found.curves)

    def loss(choice: Mapping[str, int], tokens: int = 0, draw: int = 0) -> float:
        low = [choice[n] == 0 for n in names]
        pairs = sum(3.0 for a, b in itertools.pairwise(low) if a and b)
        return sum(found.curves[n].errors[choice[n]] for n in names) + pairs + 2.0 * (low[0] + low[5])

    return replace(found, fitness=loss)


def test_beats_dynamic_programming_where_errors_do_not_add_up() -> None:
    found = interacting()
    assert found.fitness is not None
    added = found.fitness(DynamicProgramming("error").choose(found), 1, 0)
    best = brute_force(found, loss=lambda c: found.fitness(c, 1, 0))  # type: ignore[misc]
    choice = Evolutionary("error", generations=40).choose(found)
    assert found.fitness(choice, 1, 0) == pytest.approx(best)
    assert best < added


def test_the_parent_is_kept_unless_something_is_better_on_the_same_tokens() -> None:
    found = equal_steps(6, 3, 6)

    def fitness(choice: Mapping[str, int], tokens: int, draw: int) -> float:
        best = all(i == 1 for i in choice.values())  # the uniform choice is the best one, on every draw
        return (0.0 if best else 1.0) + np.random.default_rng(draw).random() * 0.5

    stages = [Stage(2, 1), Stage(2, 2), Stage(1, 4)]
    kept = evolve(found, start(found, [1] * 6), fitness, stages, generations=8, offspring=5)
    assert kept.parent == dict.fromkeys(found.curves, 1)


def test_the_loss_of_the_parent_never_grows_without_noise() -> None:
    found, losses = interacting(), []
    assert found.fitness is not None
    evolve(found, start(found, [1] * 6), found.fitness, [Stage(2, 1), Stage(1, 2)], generations=20, offspring=4, after=lambda s: losses.append(s.loss))  # fmt: skip # noqa: E501
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_every_stage_measures_all_its_candidates_on_one_fresh_draw_and_tokens_are_counted() -> None:
    found, calls = equal_steps(8, 4, 12), []

    def fitness(choice: Mapping[str, int], tokens: int, draw: int) -> float:
        calls.append((tokens, draw))
        return float(sum(k * i for k, i in enumerate(choice.values())))

    stages = [Stage(3, 10), Stage(2, 50), Stage(1, 200)]
    state = evolve(found, start(found, [1, 2] * 4), fitness, stages, generations=4, offspring=7)
    per_generation = [len(list(g)) for _, g in itertools.groupby(calls)]
    assert per_generation == [7, 3, 2 + 1] * 4
    assert len({draw for _, draw in calls}) == 12
    assert state.tokens == sum(tokens for tokens, _ in calls) == 4 * (7 * 10 + 3 * 50 + 2 * 200 + 200)


@pytest.mark.parametrize("killed", [1, 3, 6])
def test_a_search_that_was_killed_goes_on_to_the_same_end(killed: int, tmp_path: Path) -> None:
    found = replace(interacting(), journal=tmp_path / "search.json")
    allocator = Evolutionary("error", generations=8, offspring=5)
    fitness = found.fitness
    assert fitness is not None
    ends, visited = [], []
    for limit in (None, killed, None):
        count = 0

        def counted(choice: Mapping[str, int], tokens: int, draw: int) -> float:
            nonlocal count
            count += 1
            if limit is not None and count > 2 + (5 + 4 + 1) * limit + 3:  # noqa: B023
                raise KeyboardInterrupt
            visited.append(dict(choice))
            return fitness(choice, tokens, draw)

        try:
            ends.append(allocator.choose(replace(found, fitness=counted)))
        except KeyboardInterrupt:
            kept = json.loads((tmp_path / "search.json").read_text())
            assert kept["state"]["generation"] == killed
            continue
        whole = json.loads((tmp_path / "search.json").read_text())
        if limit is None and len(ends) == 1:
            first = whole
            (tmp_path / "search.json").unlink()
    assert ends[0] == ends[1]
    assert whole == first


def test_a_journal_belongs_to_its_search(tmp_path: Path) -> None:
    Journal(tmp_path / "j", "a").write(State({"w": 1}, 3, 0.5, 10))
    assert Journal(tmp_path / "j", "a").read() == State({"w": 1}, 3, 0.5, 10)
    assert Journal(tmp_path / "j", "b").read() is None


def test_seeds_decide() -> None:
    found = interacting()
    a, b = (Evolutionary("error", generations=2, offspring=3, survivors=(1,), tokens=(1,), seed=s) for s in (1, 1))
    assert a.choose(found) == b.choose(found)


def test_a_loss_that_is_not_a_number_is_the_worst() -> None:
    found = equal_steps(4, 3, 4)

    def fitness(choice: Mapping[str, int], tokens: int, draw: int) -> float:
        return 1.0 if choice["w0"] == 1 else float("nan")

    assert evolve(found, start(found, [1] * 4), fitness, ONE, generations=5, offspring=4).parent["w0"] == 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(2, 1)], r"of 4 candidates \[2\] survive: the numbers fall from stage to stage, to 1"),
        ([Stage(5, 1), Stage(1, 1)], r"of 4 candidates \[5, 1\] survive"),
        ([Stage(2, 1), Stage(3, 1), Stage(1, 1)], r"\[2, 3, 1\] survive"),
        ([], r"\[\] survive"),
        ([Stage(1, 0)], "every stage needs a positive number of tokens"),
    ],
)
def test_stages_that_make_no_sense(stages: list[Stage], message: str) -> None:
    found = equal_steps(4, 3, 4)
    with pytest.raises(ValueError, match=message):
        evolve(found, start(found, [1] * 4), lambda *_: 0.0, stages, generations=1, offspring=4)


def test_no_legal_switch_is_said_and_not_looked_for_forever() -> None:
    for found, levels in ((equal_steps(3, 1, 0), [0] * 3), (equal_steps(3, 2, 3), [1] * 3), (equal_steps(1, 3, 1), [1])):  # fmt: skip # noqa: E501
        with pytest.raises(NoSwitch, match="no weight can go a level up and others down within the budget"):
            evolve(found, start(found, levels), lambda *_: 0.0, ONE, generations=1, offspring=4)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="measures losses: give calibration text, or use dynamic_programming"):
        Evolutionary().choose(equal_steps(3, 3, 3))
    with pytest.raises(ValueError, match="2 stages of survivors against 1 of tokens"):
        Evolutionary(tokens=(5,))
    with pytest.raises(ValueError, match="the search starts with 360 bytes of 330"):
        evolve(equal_steps(3, 3, 3), State({"w0": 2, "w1": 2, "w2": 2}), lambda *_: 0.0, ONE, generations=1, offspring=2)  # fmt: skip # noqa: E501
