"""One compression, any size: stacks of one-bit blocks, and the order in which a model is loaded from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from eckart.allocation import Allocator, Problem, Uniform
from eckart.calibration.calibrate import Request
from eckart.compression.any_size import ERRORS, ORDER, resize, shrink
from eckart.forms import Form, SignStack, drop_in, parse
from eckart.forms.sign_stack import SignStackMatrix
from eckart.jobs.method import Job, Method
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.recipe import Recipe
from eckart.jobs.solve import fit
from eckart.metrics import ActivationDiagonal, Metric
from eckart.registry import method

__all__ = ["BitStack", "resize", "shrink"]

Step = tuple[str, int]
"""A layer, and the place on its curve (blocks less one) to which the step takes it."""
Order = Callable[[Problem], Sequence[Step]]


@method("bitstack", family="quantised", paper="BitStack: Any-Size Compression of Large Language Models in Variable Memory Environments, Wang et al., ICLR 2025, arXiv 2410.23918")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class BitStack(Recipe):
    """Signs times low-rank magnitudes, block upon block, under activation scales; one order in which blocks are loaded.

    Each layer is decomposed in the space where its columns are scaled by the size of their inputs (section 3.1, here
    the root mean square over tokens); the scales go back into the right factors, which is exact, so no norm or
    producer is rewritten. Every layer has its first block; then level after level is completed, within a level the
    most useful blocks first (section 3.3). The budget cuts that list. What is stored is again such a list, kept in the
    model's config: `shrink` and `resize` cut it shorter at any time, without data and without a fit.

    Departs from the paper in the default order. The paper measures the perplexity of every block by itself, levels
    times layers runs of the model; `sort="loss"` does that on the calibration text set aside. `sort="energy"` takes
    the share of the layer's weighted energy that a block removes, which costs nothing.

    Args:
        sort: `energy` or `loss`.
    """

    form: Form = field(default_factory=SignStack)
    metric: Metric = field(default_factory=lambda: ActivationDiagonal(power=1.0, statistic="rms"))
    sort: str = "energy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sort not in ("energy", "loss"):
            raise ValueError(f"sort={self.sort!r}: it is 'energy' or 'loss'")
        if not isinstance(self.form, SignStack):
            raise ValueError(f"bitstack loads blocks of sign_stack(), not of {self.form}")
        if not isinstance(self.allocation, Uniform | _Prefix):
            raise ValueError(f"bitstack spends its budget in the order of its blocks, not by {self.allocation}: set sort")  # fmt: skip # noqa: E501
        if getattr(self.metric, "centred", False):
            raise ValueError(f"bitstack leaves biases as they are, for blocks are dropped later: {self.metric} moves the mean into them")  # fmt: skip # noqa: E501

    @property
    def tries_plans(self) -> bool:
        return self.sort == "loss"

    def plan(self, job: Job) -> Plan:
        prefix = _Prefix(by_energy if self.sort == "energy" else ByLoss(self, job))
        plan = Recipe.plan(replace(self, allocation=prefix), job)
        plan.extra[ORDER] = [name for name, _ in prefix.loaded]
        plan.extra[ERRORS] = prefix.errors
        return plan

    def config_changes(self, plan: Plan) -> dict[str, Any]:
        return {ORDER: plan.extra[ORDER]}


@dataclass(frozen=True)
class _Prefix(Allocator):
    """Every weight's first block, then as many steps of an order as the budget allows."""

    order: Order
    loaded: list[Step] = field(default_factory=list, compare=False)
    errors: dict[str, list[float]] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return "the order of blocks"

    def allocate(self, problem: Problem) -> dict[str, int]:
        self.errors.update({name: list(curve.errors[:-1]) for name, curve in problem.curves.items()})
        choice = dict.fromkeys(problem.curves, 0)
        left = problem.budget - problem.nbytes(choice)
        for name, i in self.order(problem):
            nbytes = problem.curves[name].nbytes
            left -= nbytes[i] - nbytes[i - 1]
            if left < 0:
                break
            choice[name] = i
            self.loaded.append((name, i))
        return choice


def levels(problem: Problem) -> Iterable[list[Step]]:
    """Level after level, the steps that complete it; the last point of a curve is the dense layer, which is none."""
    deepest = max((len(curve) for curve in problem.curves.values()), default=0) - 2
    for i in range(1, deepest + 1):
        yield [(name, i) for name, curve in problem.curves.items() if i <= len(curve) - 2]


def by_energy(problem: Problem) -> list[Step]:
    """Within a level, the blocks that remove the largest share of their layer's energy first."""

    def left(step: Step) -> float:
        curve, i = problem.curves[step[0]], step[1]
        return (curve.errors[i] - curve.errors[i - 1]) / (curve.energy or 1.0)

    return [step for level in levels(problem) for step in sorted(level, key=left)]


@dataclass(frozen=True)
class ByLoss:
    """Within a level, the blocks after which alone the model's loss is least first: one trial of the model for each.

    A loss that is not a number counts as the worst.
    """

    method: BitStack
    job: Job

    def __call__(self, problem: Problem) -> list[Step]:
        job = self.job
        if job.trial is None:
            raise ValueError("sort='loss' needs calibration text: give texts or batches of input_ids, or sort='energy'")
        layers = self._layers(problem)
        trying = Prefixes(self._stacks(problem, layers))
        found: list[Step] = []
        for level in levels(problem):
            losses = {}
            for step in level:
                at = {n: min(step[1] - 1, len(c) - 2) + (n == step[0]) for n, c in problem.curves.items()}
                forms = {n: str(problem.curves[n].forms[i]) for n, i in at.items() if n in layers}
                plan = Plan([replace(layers[n], form=form) for n, form in forms.items()], 0, 0, 0)
                loss = job.trial(trying, plan)
                losses[step] = math.inf if math.isnan(loss) else loss
            found += sorted(level, key=losses.__getitem__)
        return found

    def _layers(self, problem: Problem) -> dict[str, Layer]:
        """The layers that have blocks at all."""
        sites, job = self.method.sites(self.job.model, self.job.blocks), self.job
        parts = {name: part for part, names in sites.items() for name in names}
        return {n: self.method._layer(job, n, parts[n], None) for n, c in problem.curves.items() if len(c) > 1}

    def _stacks(self, problem: Problem, layers: dict[str, Layer]) -> dict[str, SignStackMatrix]:
        """Every layer's deepest stack."""
        job, found = self.job, {}
        for part in job.parts:
            names = [name for name, layer in layers.items() if layer.part == part]
            with job.subject.loaded(*names):
                tasks = (self.method._task(job, n, part, str(problem.curves[n].forms[-2])) for n in names)
                for name, result in zip(names, job.executor.map(fit, tasks), strict=True):
                    assert isinstance(result.module, SignStackMatrix)
                    found[name] = result.module
        return found


@dataclass(frozen=True)
class Prefixes(Method):
    """Puts the first blocks of stacks that are there already into a model: what a trial of an order changes."""

    stacks: dict[str, SignStackMatrix]

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        return Request(probes={}, needs=frozenset())

    def plan(self, job: Job) -> Plan:
        raise TypeError("an order of blocks is tried with plans of bitstack's")

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        layers = plan.of(part)
        for layer in layers:
            module, form = job.model.get_submodule(layer.name), parse(layer.form)
            assert isinstance(form, SignStack)
            matrix = self.stacks[layer.name].first(form.blocks or 1)
            own = getattr(module, "bias", None)
            replacement = drop_in(module, matrix, None if own is None else own.detach().to(job.dtype))
            job.model.set_submodule(layer.name, replacement.requires_grad_(False))
        return layers
