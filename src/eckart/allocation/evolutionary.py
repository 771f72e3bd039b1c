"""Search for the choice that loses least, by losses that are measured and not added up (EvoPress, arXiv 2410.14649)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from eckart.allocation.additive import Additive, front
from eckart.allocation.base import ALLOCATORS, Fitness, Problem
from eckart.allocation.dynamic_programming import DynamicProgramming
from eckart.allocation.uniform import Uniform
from eckart.files import whole
from eckart.forms.base import Curve

ATTEMPTS, CHANGES, RATIO = 64, 10, 0.8


class NoSwitch(ValueError):
    """No weight can go a level up while others go down enough to pay for it."""


@dataclass(frozen=True)
class Stage:
    """One step of a selection: everyone is measured on the same `tokens`, and `survivors` go on."""

    survivors: int
    tokens: int


@dataclass(frozen=True)
class State:
    """Where a search stands after a generation; all that is needed to go on.

    Attributes:
        parent: the choice it starts from.
        generation: how many generations have been.
        loss: of the parent when it was selected.
        tokens: on which choices have been measured so far, all together.
    """

    parent: dict[str, int]
    generation: int = 0
    loss: float = math.inf
    tokens: int = 0


def evolve(
    problem: Problem, start: State, fitness: Fitness, stages: Sequence[Stage], *, generations: int, offspring: int,
    seed: int = 0, after: Callable[[State], None] = lambda state: None,
) -> State:  # fmt: skip
    """A (1 + offspring) search with level switches within the budget and selection in stages.

    Every generation draws from a generator of its own, so that a search that goes on from a state makes the very
    choices of one that was never interrupted. The parent joins the last stage, so that it is only replaced by what
    loses less on the same tokens.

    Args:
        problem: its curves are ladders, each from cheapest to dearest; a switch moves weights by single points.
        start: a choice within the budget, and the number of generations behind it.
        fitness: (choice, tokens, number of the draw) -> loss; not a number counts as infinite.
        stages: survivors fall, to 1 at the last.
        after: told the state after every generation.

    Raises:
        ValueError: where the stages make no sense or the start is above the budget; `NoSwitch` where nothing can move.
    """
    _check(stages, offspring)
    if problem.nbytes(start.parent) > problem.budget:
        raise ValueError(f"the search starts with {problem.nbytes(start.parent)} bytes of {problem.budget}")
    state = start
    while state.generation < generations:
        draw = np.random.default_rng([seed, state.generation])
        living, tokens, loss = _children(problem, state.parent, offspring, draw), 0, math.inf
        for i, stage in enumerate(stages):
            if i == len(stages) - 1:
                living = [state.parent, *living]
            number = state.generation * len(stages) + i + 1
            losses = [_measured(fitness, choice, stage.tokens, number) for choice in living]
            tokens += stage.tokens * len(living)
            order = sorted(range(len(living)), key=losses.__getitem__)[: stage.survivors]
            living, loss = [living[j] for j in order], losses[order[0]]
        state = State(living[0], state.generation + 1, loss, state.tokens + tokens)
        after(state)
    return state


def _measured(fitness: Fitness, choice: dict[str, int], tokens: int, draw: int) -> float:
    loss = fitness(choice, tokens, draw)
    return math.inf if math.isnan(loss) else loss


def _check(stages: Sequence[Stage], offspring: int) -> None:
    counts = [stage.survivors for stage in stages]
    if not counts or counts[-1] != 1 or any(b > a for a, b in zip([offspring, *counts], counts, strict=False)):
        raise ValueError(f"of {offspring} candidates {counts} survive: the numbers fall from stage to stage, to 1")
    if min(stage.tokens for stage in stages) < 1:
        raise ValueError("every stage needs a positive number of tokens")


def _children(problem: Problem, parent: dict[str, int], count: int, draw: np.random.Generator) -> list[dict[str, int]]:
    """At most `count` different choices, each some switches away from the parent. Fewer where there are no more."""
    seen = {tuple(parent.values())}
    made: list[dict[str, int]] = []
    for _ in range(ATTEMPTS * count):
        child = dict(parent)
        switches = int(min(draw.integers(1, 4, size=2)))
        if all(_switch(problem, child, draw) for _ in range(switches)) and tuple(child.values()) not in seen:
            seen.add(tuple(child.values()))
            made.append(child)
            if len(made) == count:
                break
    if not made:
        raise NoSwitch("no weight can go a level up and others down within the budget: give ladders of more levels")
    return made


def _switch(problem: Problem, choice: dict[str, int], draw: np.random.Generator) -> bool:
    """One weight a level up, and others down by single levels until the budget is met; whether that was possible.

    Half the time the weight that goes down is one whose step frees just what was spent, if there is one.
    """
    curves = problem.curves
    up = [name for name, i in choice.items() if i + 1 < len(curves[name])]
    if not up:
        return False
    raised = up[int(draw.integers(len(up)))]
    choice[raised] += 1
    added, removed = _step(curves[raised], choice[raised]), 0
    over, even = problem.nbytes(choice) - problem.budget, bool(draw.integers(2))
    for _ in range(CHANGES):
        if over <= 0:
            break
        down = [name for name, i in choice.items() if i > 0 and name != raised]
        same = [name for name in down if _step(curves[name], choice[name]) == added]
        down = same if even and same else down
        if not down:
            return False
        lowered = down[int(draw.integers(len(down)))]
        freed = _step(curves[lowered], choice[lowered])
        choice[lowered] -= 1
        over, removed = over - freed, removed + freed
    # what could not be paid for, and what was paid for much too dearly, is not tried
    return over <= 0 and (removed <= added or added / removed >= RATIO or not even)


def _step(curve: Curve, i: int) -> int:
    """Bytes that point i takes more than the one below."""
    return curve.nbytes[i] - curve.nbytes[i - 1]


@ALLOCATORS.word("evolutionary")
@dataclass(frozen=True)
class Evolutionary(Additive):
    """The least measured loss: an evolutionary search that starts from the better of two allocations that add up.

    It needs a fitness: the loss of the whole model after a choice, on calibration text. Departs from the paper: the
    search begins at dynamic programming or a uniform share, both of points that no other beats, whichever measures
    better; units of any sizes pay for one another; and it is shorter by default (the paper takes 150 generations of
    128 and stages of 16, 4, 1 on 2048, 16384 and 131072 tokens for bits).

    Args:
        generations: how many.
        offspring: candidates in each.
        survivors: of every stage, the last of which is 1.
        tokens: on which every stage measures; all there are where there are fewer.
        levels: to which every ladder is thinned; the points of both starts are added.
        enough: a start that is measured to lose no more than this is taken without a search.
        seed: of the search.
    """

    generations: int = 30
    offspring: int = 16
    survivors: tuple[int, ...] = (4, 1)
    tokens: tuple[int, ...] = (2048, 16384)
    levels: int = 12
    seed: int = 0
    enough: float = 1e-3
    needs_fitness = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.survivors) != len(self.tokens):
            raise ValueError(f"evolutionary(): {len(self.survivors)} stages of survivors against {len(self.tokens)} of tokens")  # fmt: skip # noqa: E501
        _check(self.stages, self.offspring)
        if self.levels < 2 or self.generations < 0:
            raise ValueError(f"evolutionary(levels={self.levels}, generations={self.generations}): at least 2 and 0")

    @property
    def stages(self) -> list[Stage]:
        return [Stage(n, t) for n, t in zip(self.survivors, self.tokens, strict=True)]

    def allocate(self, problem: Problem) -> dict[str, int]:
        if problem.fitness is None:
            raise ValueError("evolutionary allocation measures losses: give calibration text, or use dynamic_programming()")  # fmt: skip # noqa: E501
        fronts = {name: self._front(curve) for name, curve in problem.curves.items()}
        unbeaten = replace(problem, curves={n: c.only(fronts[n]) for n, c in problem.curves.items()})
        chosen = [allocator.choose(unbeaten) for allocator in (DynamicProgramming(self.damage), Uniform())]
        starts = [{name: fronts[name][i] for name, i in choice.items()} for choice in chosen]
        points = {n: self._levels(curve, [start[n] for start in starts]) for n, curve in problem.curves.items()}
        short = replace(problem, curves={n: c.only(points[n]) for n, c in problem.curves.items()}, fitness=None)
        full = problem.fitness

        def fitness(choice: Mapping[str, int], tokens: int, draw: int) -> float:
            return full({name: points[name][i] for name, i in choice.items()}, tokens, draw)

        kept = None if problem.journal is None else Journal(problem.journal, f"{self}{short.budget}{short.curves}")
        state = kept.read() if kept else None
        if state is None:
            parents = [{name: points[name].index(i) for name, i in start.items()} for start in starts]
            measured = [_measured(fitness, parent, self.tokens[-1], 0) for parent in parents]
            best = int(np.argmin(measured))
            state = State(parents[best], 0, measured[best], 2 * self.tokens[-1])
        if (
            state.loss > self.enough
            and any(i + 1 < len(short.curves[name]) for name, i in state.parent.items())
            and len(short.curves) > 1
        ):
            state = evolve(
                short, state, fitness, self.stages, generations=self.generations, offspring=self.offspring,
                seed=self.seed, after=kept.write if kept else lambda state: None,
            )  # fmt: skip
        return {name: points[name][i] for name, i in state.parent.items()}

    def _front(self, curve: Curve) -> list[int]:
        """The points that no other beats in both bytes and damage, cheapest first."""
        found: list[int] = front(np.asarray(curve.nbytes, dtype=np.float64), self.damages(curve)).tolist()
        return found

    def _levels(self, curve: Curve, more: Sequence[int]) -> list[int]:
        """The points that are tried: `more`, and evenly spaced ones that no other beats, both ends included."""
        best = self._front(curve)
        at = np.unique(np.linspace(0, len(best) - 1, min(self.levels, len(best))).round().astype(int)).tolist()
        return sorted({*(best[i] for i in at), *more}, key=lambda i: (curve.nbytes[i], -curve.errors[i]))


class Journal:
    """The state of a search in a JSON file, which belongs to that very search.

    Args:
        path: of the file.
        search: text that is different for another search.
    """

    def __init__(self, path: Path, search: str):
        self.path, self.search = path, hashlib.sha256(search.encode()).hexdigest()

    def read(self) -> State | None:
        """The last state; None where there is none of this search."""
        if not self.path.exists():
            return None
        kept = json.loads(self.path.read_text(encoding="utf-8"))
        return State(**kept["state"]) if kept["search"] == self.search else None

    def write(self, state: State) -> None:
        with whole(self.path) as temporary:
            temporary.write_text(json.dumps({"search": self.search, "state": asdict(state)}), encoding="utf-8")
