"""The best model at a size: several methods plan under the same budget, and the least loss on unseen text wins."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from eckart.allocation import BudgetError, Uniform
from eckart.calibration.calibrate import Request
from eckart.compression.mixed import Mixed
from eckart.compression.modegpt import MoDeGPT
from eckart.compression.slicegpt import SliceGPT
from eckart.forms import Quantized
from eckart.forms.grids import Uniform as UniformGrid
from eckart.jobs.method import Job, Method
from eckart.jobs.plan import Layer, Plan
from eckart.metrics import Plain
from eckart.registry import method

NEGLIGIBLE = 3e-3
"""Nats per token that are not worth a calibration: a third of a percent of the perplexity."""


def simple() -> Method:
    """What needs no calibration and loses next to nothing: codes of eight bits for all layers and tables.

    Their grid is symmetric, so that GGUF holds them as they are (Q8_0).
    """
    codes = Quantized(bits=8, grid=UniformGrid(symmetric=True))
    return Mixed(form=codes, metric=Plain(), allocation=Uniform(), outside=codes)


def candidates() -> tuple[Method, ...]:
    """What `auto` chooses among, the most promising first."""
    return (simple(), Mixed(), MoDeGPT(), SliceGPT())


@method("auto", family="mixture", paper="eckart's own")
@dataclass(frozen=True)
class Auto(Method):
    """The candidate whose plan loses least on calibration text that no statistics saw.

    Where eight bits a weight fit the budget and are measured to lose next to nothing, that is all. Else forms are
    mixed layer by layer (see `Mixed`), and the plans of methods that change the model's widths are tried beside that.
    """

    @property
    def tries_plans(self) -> bool:
        return True

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        return merged([c.request(model, blocks) for c in self._able(model, blocks)])

    def _able(self, model: nn.Module, blocks: list[str]) -> list[Method]:
        """The candidates that know how to treat this model."""
        able = []
        for candidate in candidates():
            try:
                candidate.request(model, blocks)
            except ValueError:  # a family it does not know, or parts it cannot treat
                continue
            able.append(candidate)
        return able

    def at_once(self, job: Job) -> Plan | None:
        if job.trial is None:
            return None
        try:
            plan = simple().plan(job)
        except BudgetError:
            return None
        lost = job.trial(simple(), plan, measure="divergence")
        if not lost <= NEGLIGIBLE:
            return None
        plan.extra |= {"candidate": 0, "chosen": label(simple()), "tried": {label(simple()): lost}}
        remark = f"{label(simple())} for every weight costs {lost:.2g} nats an answer, measured on data set aside: below {NEGLIGIBLE:g} nothing else is tried"  # fmt: skip # noqa: E501
        return replace(plan, statistics=False, remarks=[remark])

    def plan(self, job: Job) -> Plan:
        if job.trial is None:
            raise ValueError("auto measures plans on calibration data: give at least two batches")
        best: tuple[float, int, Plan] | None = None
        tried, impossible = {}, []
        for i, candidate in enumerate(candidates()):
            if candidate not in self._able(job.model, job.blocks):
                continue
            try:
                plan = candidate.plan(job)
            except BudgetError as e:
                impossible.append(f"{label(candidate)}: {e}")
                continue
            loss = job.trial(candidate, plan, measure="divergence")
            tried[label(candidate)] = loss
            if best is None or loss < best[0] or math.isnan(best[0]):
                best = (loss, i, plan)
            if loss <= NEGLIGIBLE:
                break
        if best is None:
            raise BudgetError("; ".join(impossible))
        best[2].extra |= {"candidate": best[1], "chosen": label(candidates()[best[1]]), "tried": tried}
        found = ", ".join(f"{name} {loss:.3g}" for name, loss in tried.items())
        return replace(best[2], remarks=[f"nats an answer that plans cost, measured on data set aside: {found}"])

    def config_changes(self, plan: Plan) -> dict[str, Any]:
        return candidates()[plan.extra["candidate"]].config_changes(plan)

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        return candidates()[plan.extra["candidate"]].rewrite(job, plan, part)


def label(candidate: Method) -> str:
    """What to call a candidate in a report."""
    if isinstance(candidate, Mixed):
        return "mixed" if candidate == Mixed() else str(candidate.form)
    return candidate.key


def merged(requests: list[Request]) -> Request:
    """What serves all of several methods."""
    probes: dict[int, list[str]] = {}
    for request in requests:
        for part, names in request.probes.items():
            probes[part] = list(dict.fromkeys([*probes.get(part, []), *names]))
    labels = {r.labels for r in requests if r.gradients}
    if len(labels) > 1:
        raise ValueError("candidates want gradients of different losses: choose those of one kind")
    return Request(
        probes=probes,
        needs=frozenset().union(*(r.needs for r in requests)),
        labels=labels.pop() if labels else "data",
        influence=any(r.influence for r in requests),
        gradient_samples=max(r.gradient_samples for r in requests),
    )
