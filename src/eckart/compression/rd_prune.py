"""Sparsity spread over layers by what pruning each of them does to the output of the whole network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from eckart.allocation import Allocator
from eckart.allocation.dynamic_programming import DynamicProgramming
from eckart.forms import Curve, Dense, Form, parse
from eckart.jobs.method import Job
from eckart.jobs.plan import Layer, Plan
from eckart.jobs.recipe import Recipe
from eckart.registry import method


@method("rd_prune", family="sparse", paper="Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks, Xu et al., ICCV 2023, arXiv 2308.10438")  # fmt: skip # noqa: E501
@dataclass(frozen=True)
class RDPrune(Recipe):
    """Magnitude pruning whose densities minimise the summed output distortion, by dynamic programming (eq. 8 to 10).

    The distortion of a layer at a density is the mean squared change of the model's logits, on calibration text set
    aside, when that layer alone is pruned: it is measured at `amounts` points of every layer's curve and taken as
    linear in bytes between them, from exactly 0 where the layer stays dense. Distortions of several layers are taken
    to add up; the plan's extra entries tell their sum beside what all layers do together.

    Departs from the paper: budgets are bytes, with the places of the kept weights; one-shot, without the iterations
    of pruning and retraining. Other open forms may be given: their dials are then set in the same way.

    Args:
        amounts: points measured of every layer, each by a forward pass over the text (the paper takes 100).
        tokens: of that text, at most.
    """

    form: Form = field(default_factory=lambda: parse("sparse(selection=magnitude())"))
    allocation: Allocator = field(default_factory=lambda: DynamicProgramming(damage="error"))
    amounts: int = 10
    tokens: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("amounts", "tokens"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"rd_prune({name}={getattr(self, name)!r}): a positive whole number")

    @property
    def tries_plans(self) -> bool:
        return True

    def plan(self, job: Job) -> Plan:
        plan = super().plan(job)
        summed = sum(
            found.errors[[str(form) for form in found.forms].index(layer.form)]
            for layer in plan.layers
            if (found := job.scratch[self].get(layer.name)) is not None
        )
        plan.extra["distortion"] = {"summed": summed, "joint": self._distortion(job, plan.layers)}
        return plan

    def judged(self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve]) -> Mapping[str, Curve]:
        found: dict[str, Curve] = {}
        for name, curve in curves.items():
            points = np.unique(np.linspace(0, len(curve) - 1, min(self.amounts + 1, len(curve))).round().astype(int))
            errors = [self._distortion(job, [self._planned(layers[name], curve, int(i))]) for i in points]
            at = np.asarray(curve.nbytes)[points]
            between = np.interp(curve.nbytes, at, errors).tolist()
            found[name] = replace(curve, errors=[float(e) for e in between], spectrum=None)
        job.scratch[self] = found
        return found

    def _distortion(self, job: Job, layers: list[Layer]) -> float:
        """Mean squared change of the logits when these layers are as planned and all others as they are."""
        if job.trial is None:
            raise ValueError("rd_prune measures the output of the model: give at least two batches of calibration data")
        changed = [layer for layer in layers if not isinstance(parse(layer.form), Dense)]
        if not changed:
            return 0.0
        found = job.trial(self, Plan(changed, 0, 0, 0), tokens=self.tokens, measure="squares")
        if not np.isfinite(found):
            raise ValueError(f"{changed[0].name} as {changed[0].form}: the model's output is not finite; leave the layer out by targets")  # fmt: skip # noqa: E501
        return found
