"""The common case of a method (`Recipe`): a form, a metric, an allocation."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from eckart.allocation import Allocator, BudgetError, Problem, Uniform
from eckart.allocation.base import Fitness
from eckart.calibration.calibrate import Request
from eckart.calibration.store import OUTSIDE
from eckart.checkpoint.layout import header_bytes
from eckart.checkpoint.ties import sharers
from eckart.forms import Curve, Dense, Form
from eckart.forms.base import Shape
from eckart.forms.layers import kind_of
from eckart.jobs.layerwise import Layerwise
from eckart.jobs.method import Job, added_header_bytes, count_weights, output_bytes, part_of
from eckart.jobs.plan import Layer, Plan, join_notes, sample_spectrum
from eckart.jobs.solve import curve


@dataclass(frozen=True)
class Recipe(Layerwise):
    """One form for all targeted layers, fitted in one metric, its dials set by one allocator.

    Args:
        allocation: how the budget is spread.
        one_shot: fit all layers on statistics of the original model; otherwise block by block on the compressed one.
        targets: regular expression that the names of targeted layers match in full; empty for all linear layers,
            transformers' Conv1D and convolutions within the blocks, or all but the head where there are no blocks.
    """

    allocation: Allocator = field(default_factory=Uniform)
    one_shot: bool = True
    targets: str = ""

    def __post_init__(self) -> None:
        try:
            re.compile(self.targets)
        except re.error as e:
            raise ValueError(f"targets={self.targets!r} is not a regular expression: {e}") from None

    @property
    def sequential(self) -> bool:
        return not self.one_shot and bool(self.metric.needs)

    @property
    def tries_plans(self) -> bool:
        return self.allocation.needs_fitness

    def sites(self, model: nn.Module, blocks: list[str]) -> dict[int, list[str]]:
        """Part -> names of the targeted layers."""
        found: dict[int, list[str]] = {}
        owner: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = owner()
        for name, module in model.named_modules():
            kind = self.kind(module)
            if kind is None or not self._targeted(name, kind, blocks, module is head):
                continue
            found.setdefault(part_of(name, blocks), []).append(name)
        if not found:
            raise ValueError(f"no layer of {type(model).__name__} is targeted{f' by {self.targets!r}' if self.targets else ''}")  # fmt: skip # noqa: E501
        return found

    def kind(self, module: nn.Module) -> str | None:
        """What kind of layer a module is; None for what is never targeted."""
        return kind_of(module)

    def _targeted(self, name: str, kind: str, blocks: list[str], head: bool) -> bool:
        if self.targets:
            return re.fullmatch(self.targets, name) is not None
        if blocks:
            return kind != "embedding" and part_of(name, blocks) != OUTSIDE
        return kind != "embedding" and not head

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        needs = self.metric.needs
        sites = self.sites(model, blocks) if needs else {}
        probes = {
            part: [n for n in names if self._stays(model, n) is None and self.metric_of(model, n).needs]
            for part, names in sites.items()
        }
        return Request(
            probes={part: names for part, names in probes.items() if names},
            needs=needs,
            labels=self.metric.labels,
            influence=self.allocation.needs_influence,
        )

    def stays(self, model: nn.Module, name: str) -> str | None:
        """Why a targeted layer stays dense under any budget; None where nothing is in the way."""
        return None

    def _stays(self, model: nn.Module, name: str) -> str | None:
        why, table = self.stays(model, name), kind_of(model.get_submodule(name)) == "embedding"
        if why is None and table and self._centred(model, name) and sharers(model, name):
            return "a head shares it, which has no place for the mean of its rows"
        return why

    def plan(self, job: Job) -> Plan:
        started = time.perf_counter()
        curves, layers, staying = {}, {}, []
        sites = self.sites(job.model, job.blocks)
        for part, names in sites.items():
            for name in names:
                why = self._stays(job.model, name)
                if why:
                    staying.append(self._layer(job, name, part, f"left dense: {why}"))
                else:
                    layers[name] = self._layer(job, name, part, None)
        fixed = job.input_bytes - sum(layer.dense_bytes for layer in layers.values())
        total = job.budget.total(
            input_bytes=job.input_bytes, weights=count_weights(job), target_bytes=job.input_bytes - fixed
        )
        rungs = self._rungs(job, layers)
        problem = Problem(rungs, total - fixed - self._headers(job, layers, rungs))
        self._check(job, total, problem.smallest + total - problem.budget)
        forms = {name: self.form_of(job.model, name) for name in layers}
        by_bytes = not self.allocation.needs_errors and all(form.fits_rungs for form in forms.values())
        if by_bytes:
            forms = {name: rungs[name].forms[i] for name, i in self.allocation.choose(problem).items()}
        for done, part in enumerate(job.parts):
            names = [name for name in sites.get(part, []) if name in layers]
            with job.subject.loaded(*names):
                tasks = (self._task(job, name, part, str(forms[name])) for name in names)
                for name, (found, note) in zip(names, job.executor.map(curve, tasks), strict=True):
                    curves[name] = self._with_bias(job, name, found)
                    layers[name] = replace(layers[name], note=note)
            job.progress("plan", done + 1, len(job.parts))
        problem = Problem(
            self.judged(job, layers, curves),
            total - fixed - self._headers(job, layers, curves),
            {name: layer.part for name, layer in layers.items() if layer.part != OUTSIDE},
            job.influence,
            self._fitness(job, layers, curves),
            job.trial.folder / "search.json" if job.trial else None,
        )
        self._check(job, total, problem.smallest + total - problem.budget)
        choice = dict.fromkeys(layers, 0) if by_bytes else self.allocation.choose(problem)
        planned = [self._planned(layers[name], curves[name], choice[name]) for name in layers]
        after = output_bytes(job, {layer.name: self._layout(job, layer) for layer in planned})
        seconds = 1.2 * (time.perf_counter() - started)
        return Plan([*planned, *staying, *self._unknown(job)], job.input_bytes, after, total, seconds)

    def _unknown(self, job: Job) -> Iterator[Layer]:
        """Weights among the targets that no form can stand for, such as stacked experts: they are listed as dense."""
        for name, module in job.model.named_modules():
            if kind_of(module) is not None or not self._targeted(name, "", job.blocks, head=False):
                continue
            part = part_of(name, job.blocks)
            for own, weight in module.named_parameters(recurse=False):
                if weight.dim() > 1:
                    shape = weight.numel() // weight.shape[-1], weight.shape[-1]
                    nbytes = weight.numel() * job.dtype.itemsize
                    note = f"left dense: {type(module).__name__} is no layer that a form can stand for"
                    yield Layer(f"{name}.{own}", "", part, shape, str(Dense()), nbytes, nbytes, note=note)

    def _made_of(self) -> str:
        """What a message calls that which layers are made of."""
        return str(self.form)

    def _check(self, job: Job, total: int, smallest: int) -> None:
        """Raise `BudgetError` where the least possible output is above the budget."""
        if smallest > total:
            share = smallest / job.input_bytes
            raise BudgetError(f"the budget {job.budget} is {total} bytes; with {self._made_of()} on these layers the smallest possible is {smallest} bytes ({share:.3f} of the input)")  # fmt: skip # noqa: E501

    def _rungs(self, job: Job, layers: Mapping[str, Layer]) -> dict[str, Curve]:
        """The bytes that each layer's form can take, told before anything is fitted; errors are not known yet."""
        known: dict[tuple[Form, Shape], Curve] = {}
        found = {}
        for name, layer in layers.items():
            key = self.form_of(job.model, name), layer.shape
            if key not in known:
                rungs = [(f.nbytes(layer.shape, job.dtype), f) for f in key[0].ladder(layer.shape)]
                paying = sorted((r for r in rungs if r[0] < layer.dense_bytes), key=lambda r: r[0])
                forms, nbytes = [*(f for _, f in paying), Dense()], [*(n for n, _ in paying), layer.dense_bytes]
                known[key] = Curve(forms, nbytes, [0.0] * len(forms), 0.0)
            found[name] = self._with_bias(job, name, known[key])
        return found

    def judged(self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve]) -> Mapping[str, Curve]:
        """The curves as the allocation sees them: the same points, perhaps with other errors than the metric's."""
        return curves

    def _fitness(self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve]) -> Fitness | None:
        """How far the model's answers move after a choice, in nats per token; None where the allocation adds up."""
        if not self.allocation.needs_fitness:
            return None
        trial = job.trial
        if trial is None:
            raise ValueError(f"{self.allocation} measures plans on calibration data: give at least two batches")

        known: dict[tuple[Any, ...], float] = {}

        def fitness(choice: Mapping[str, int], tokens: int, draw: int) -> float:
            key = (*choice.items(), *trial.drawn(tokens, draw))
            if key not in known:
                plan = Plan([self._planned(layers[n], curves[n], i) for n, i in choice.items()], 0, 0, 0)
                known[key] = trial(self, plan, tokens=tokens, draw=draw, measure="divergence", keep=True)
            return known[key]

        return fitness

    def _headers(self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve]) -> int:
        """Most bytes that names and shapes of new tensors add: every layer at the setting that has most of them."""
        known: dict[tuple[Any, ...], int] = {}

        def header(planned: Layer) -> int:
            biased = getattr(job.model.get_submodule(planned.name), "bias", None) is not None
            key = planned.form, planned.shape, planned.kind, biased
            if key not in known:
                known[key] = header_bytes(self._layout(job, planned), planned.dense_bytes)
            return known[key]

        longest = []
        for name, layer in layers.items():
            curve = curves[name]
            rungs = (self._planned(layer, curve, i) for i in range(max(1, len(curve) - 1)))  # but the dense one
            longest.append(max(rungs, key=header))
        return added_header_bytes(job, {layer.name: self._layout(job, layer) for layer in longest})

    def _planned(self, layer: Layer, found: Curve, index: int) -> Layer:
        form = found.forms[index]
        dense = isinstance(form, Dense)
        return replace(
            layer,
            form=str(form),
            bytes=found.nbytes[index],
            predicted_error=found.errors[index],
            energy=found.energy,
            spectrum=None if found.spectrum is None else sample_spectrum(found.spectrum),
            note=join_notes(layer.note, "left dense: no smaller setting was worth it" if dense else None),
        )
