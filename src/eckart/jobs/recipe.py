"""What every compression method owes (`Method`), and the common case (`Recipe`): a form, a metric, an allocation."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.allocation import Allocator, Budget, BudgetError, Problem, Uniform
from eckart.calibration.calibrate import Request
from eckart.calibration.store import OUTSIDE
from eckart.calibration.subject import Subject, outside
from eckart.checkpoint.layout import Layout, file_bytes, layout_of
from eckart.forms import Curve, Dense, Form, LowRank, drop_in, parse
from eckart.forms.base import Shape
from eckart.forms.layers import kind_of, matrix_of, matrix_shape
from eckart.jobs.plan import Layer, Plan, join_notes, sample_spectrum
from eckart.jobs.solve import Executor, Task, curve, fit
from eckart.metrics import InputCovariance, Metric, Plain, Statistics
from eckart.metrics.row_frequencies import RowFrequencies


@dataclass
class Job:
    """What a method works with.

    Attributes:
        subject: the model, a part of which is loaded at a time.
        blocks: names of its blocks.
        budget: what was asked for.
        statistics: (layer, part) -> statistics of the original model.
        influence: of the blocks, where the method asked for it.
        layouts: for every part (the blocks, then what lies outside) the tensors of the input, as they are stored.
        executor: runs the work on layers.
        progress: told (stage, done, total).
        seed: of every random choice.
        trial: (method, plan) -> mean loss per token, on calibration text that no statistics saw, of the model as it
            would be after that plan; only for methods that ask to try plans.
        scratch: what methods keep in memory between their calls; empty again when a killed job is resumed.
    """

    subject: Subject
    blocks: list[str]
    budget: Budget
    statistics: Callable[[str, int], Statistics]
    influence: list[float]
    layouts: Mapping[int, Layout]
    executor: Executor
    progress: Callable[[str, int, int], None]
    seed: int
    trial: Callable[[Method, Plan], float] | None = None
    scratch: dict[Any, Any] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        return self.subject.model

    @property
    def dtype(self) -> torch.dtype:
        return self.subject.storage_dtype

    @property
    def parts(self) -> list[int]:
        """The blocks in order, then what lies outside."""
        return [*range(len(self.blocks)), OUTSIDE]

    @property
    def input_bytes(self) -> int:
        """Of the input's weights, in this layout."""
        return sum(file_bytes(layout) for layout in self.layouts.values())

    def module_names(self, part: int) -> list[str]:
        """The modules that make up a part."""
        if part != OUTSIDE:
            return [self.blocks[part]]
        return outside(self.model, self.blocks)


@dataclass(frozen=True)
class Method(ABC):
    """A way to compress a model. Its dataclass fields are its hyperparameters."""

    key: ClassVar[str] = ""

    @property
    def sequential(self) -> bool:
        """Whether each block is fitted on what the compressed blocks before it put out."""
        return False

    @property
    def tries_plans(self) -> bool:
        """Whether the method needs calibration text set aside, on which it measures plans."""
        return False

    @abstractmethod
    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        """What must be measured first."""

    @abstractmethod
    def plan(self, job: Job) -> Plan:
        """What to do with every layer. Nothing is changed."""

    @abstractmethod
    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        """Change one part of the model, which is loaded, as planned; returns its layers with their measured errors.

        Modules are replaced and never written into, so that a plan can be tried and taken back.
        """

    def config_changes(self, plan: Plan) -> dict[str, Any]:
        """Entries of the model's config that are different once the plan is carried out."""
        return {}


@dataclass(frozen=True)
class Recipe(Method):
    """One form for all targeted layers, fitted in one metric, its dials set by one allocator.

    Args:
        form: an open form; the budget closes it.
        metric: which error counts.
        allocation: how the budget is spread.
        one_shot: fit all layers on statistics of the original model; otherwise block by block on the compressed one.
        targets: regular expression that the names of targeted layers match in full; empty for all linear layers,
            transformers' Conv1D and convolutions within the blocks.
    """

    form: Form = field(default_factory=LowRank)
    metric: Metric = field(default_factory=Plain)
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

    def sites(self, model: nn.Module, blocks: list[str]) -> dict[int, list[str]]:
        """Part -> names of the targeted layers."""
        found: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            kind = kind_of(module)
            if kind is None or not self._targeted(name, kind, blocks):
                continue
            part = next((i for i, b in enumerate(blocks) if name == b or name.startswith(b + ".")), OUTSIDE)
            found.setdefault(part, []).append(name)
        if not found:
            raise ValueError(f"no layer of {type(model).__name__} is targeted{f' by {self.targets!r}' if self.targets else ''}")  # fmt: skip # noqa: E501
        return found

    def _targeted(self, name: str, kind: str, blocks: list[str]) -> bool:
        if self.targets:
            return re.fullmatch(self.targets, name) is not None
        inside = not blocks or any(name == b or name.startswith(b + ".") for b in blocks)
        return inside and kind != "embedding"

    def request(self, model: nn.Module, blocks: list[str]) -> Request:
        needs = self.metric.needs
        sites = self.sites(model, blocks) if needs else {}
        return Request(
            probes={part: [n for n in names if self.stays(model, n) is None] for part, names in sites.items()},
            needs=needs,
            labels=self.metric.labels,
            influence=self.allocation.needs_influence,
        )

    def stays(self, model: nn.Module, name: str) -> str | None:
        """Why a targeted layer stays dense under any budget; None where nothing is in the way."""
        return None

    def form_of(self, model: nn.Module, name: str) -> Form:
        """The open form of one layer."""
        return self.form

    def plan(self, job: Job) -> Plan:
        started = time.perf_counter()
        curves, layers, staying = {}, {}, []
        sites = self.sites(job.model, job.blocks)
        for done, part in enumerate(job.parts):
            reasons = {name: self.stays(job.model, name) for name in sites.get(part, [])}
            staying += [self._layer(job, n, part, f"left dense: {why}") for n, why in reasons.items() if why]
            names = [name for name, why in reasons.items() if not why]
            with job.subject.loaded(*names):
                tasks = (self._task(job, name, part, str(self.form_of(job.model, name))) for name in names)
                for name, (found, note) in zip(names, job.executor.map(curve, tasks), strict=True):
                    curves[name] = self._with_bias(job, name, found)
                    layers[name] = self._layer(job, name, part, note)
            job.progress("plan", done + 1, len(job.parts))
        fixed = job.input_bytes - sum(layer.dense_bytes for layer in layers.values())
        total = job.budget.total(
            input_bytes=job.input_bytes, weights=count_weights(job), target_bytes=job.input_bytes - fixed
        )
        problem = Problem(
            curves,
            total - fixed - self._headers(job, layers, curves, fixed),
            {name: layer.part for name, layer in layers.items() if layer.part != OUTSIDE},
            job.influence,
        )
        if problem.smallest > problem.budget:
            raise BudgetError(
                f"the budget {job.budget} is {total} bytes; with {self.form} on these layers the smallest possible is "
                f"{problem.smallest + total - problem.budget} bytes ({(problem.smallest + total - problem.budget) / job.input_bytes:.3f} of the input)"  # noqa: E501
            )
        choice = self.allocation.choose(problem)
        planned = [self._planned(layers[name], curves[name], choice[name]) for name in layers]
        after = output_bytes(job, {layer.name: self._layout(job, layer) for layer in planned})
        seconds = 1.2 * (time.perf_counter() - started)
        return Plan([*planned, *staying], job.input_bytes, after, total, seconds)

    def _headers(self, job: Job, layers: Mapping[str, Layer], curves: Mapping[str, Curve], fixed: int) -> int:
        """Most bytes that names and shapes of new tensors add: with every layer at its dearest factored setting."""
        dearest = [self._planned(layer, curves[n], max(0, len(curves[n]) - 2)) for n, layer in layers.items()]
        data = fixed + sum(layer.bytes for layer in dearest)
        return output_bytes(job, {layer.name: self._layout(job, layer) for layer in dearest}) - data

    @property
    def _centred(self) -> bool:
        return getattr(self.metric, "centred", False)

    def _gains_bias(self, job: Job, name: str) -> bool:
        """Whether a layer without a bias gets one, for what the mean of its inputs loses."""
        return self._centred and getattr(job.model.get_submodule(name), "bias", None) is None

    def _with_bias(self, job: Job, name: str, found: Curve) -> Curve:
        """The curve with the bytes of a new bias added to all points but the dense one."""
        module = job.model.get_submodule(name)
        width = bias_width(kind_of(module) or "", matrix_shape(module))
        extra = width * job.dtype.itemsize if self._gains_bias(job, name) else 0
        return replace(found, nbytes=[*(n + extra for n in found.nbytes[:-1]), found.nbytes[-1]])

    def _layout(self, job: Job, layer: Layer) -> Layout:
        """The tensors that a layer will hold, by their names in its module."""
        form, module = parse(layer.form), job.model.get_submodule(layer.name)
        if isinstance(form, Dense):
            return layout_of({k: v.to("meta", job.dtype) for k, v in module.state_dict().items()})
        own = layer.kind != "embedding" and getattr(module, "bias", None) is not None
        width = bias_width(layer.kind, layer.shape)
        bias = torch.empty(width, dtype=job.dtype, device="meta") if own or self._centred else None
        matrix = form.build(layer.shape, dtype=job.dtype, device="meta")
        return layout_of(drop_in(module, matrix, bias).state_dict())

    def _layer(self, job: Job, name: str, part: int, note: str | None) -> Layer:
        module = job.model.get_submodule(name)
        shape = matrix_shape(module)
        nbytes = shape[0] * shape[1] * job.dtype.itemsize
        return Layer(name, kind_of(module) or "", part, shape, str(Dense()), nbytes, nbytes, note=note)

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

    def _task(self, job: Job, name: str, part: int, form: str) -> Task:
        module = job.model.get_submodule(name)
        matrix = matrix_of(module).detach()
        statistics = job.statistics(name, part) if self.metric.needs else Statistics()
        if kind_of(module) != "embedding" or not isinstance(self.metric, InputCovariance):
            return Task(name, matrix, form, self.metric, statistics, job.dtype)
        mean = self._mean_row(job, name, part)
        matrix = matrix.double()  # rare rows are divided by their small weights
        return Task(name, matrix if mean is None else matrix - mean, form, RowFrequencies(), statistics, job.dtype)

    def _mean_row(self, job: Job, name: str, part: int) -> Float[Tensor, " dim"] | None:
        """The mean of the vectors looked up in a table, which its bias takes over when the metric is about the mean."""
        if not self._centred:
            return None
        f = RowFrequencies().frequencies(job.statistics(name, part), name)
        return f @ matrix_of(job.model.get_submodule(name)).detach().double()

    def _new_bias(self, job: Job, layer: Layer, shift: Float[Tensor, " out"] | None) -> Tensor | None:
        own: Tensor | None = getattr(job.model.get_submodule(layer.name), "bias", None)
        if layer.kind == "embedding":
            return self._mean_row(job, layer.name, layer.part)  # a bias of its own is part of its rows
        if shift is None:
            return own
        return shift if own is None else own.detach() + shift.to(own)

    def rewrite(self, job: Job, plan: Plan, part: int) -> list[Layer]:
        layers = plan.of(part)
        fitted = [layer for layer in layers if not isinstance(parse(layer.form), Dense)]
        tasks = (self._task(job, layer.name, part, layer.form) for layer in fitted)
        done = {layer.name: layer.measured(0.0) for layer in layers}
        for layer, result in zip(fitted, job.executor.map(fit, tasks), strict=True):
            module = job.model.get_submodule(layer.name)
            bias = self._new_bias(job, layer, result.bias_shift)
            replacement = drop_in(module, result.module, None if bias is None else bias.detach().to(job.dtype))
            job.model.set_submodule(layer.name, replacement.requires_grad_(False))
            done[layer.name] = layer.measured(result.error, result.note)
        return list(done.values())


def bias_width(kind: str, shape: Shape) -> int:
    """Numbers in what a layer puts out: its rows, or the columns of a table."""
    return shape[1 if kind == "embedding" else 0]


def output_bytes(job: Job, replaced: Mapping[str, Layout]) -> int:
    """Bytes of all weight files, to the byte, when the modules called `replaced` hold these tensors instead."""
    total = 0
    for layout in job.layouts.values():
        kept = {k: v for k, v in layout.items() if k.rpartition(".")[0] not in replaced}
        for name in dict.fromkeys(k.rpartition(".")[0] for k in layout):
            kept |= {f"{name}.{k}": v for k, v in replaced.get(name, {}).items()}
        total += file_bytes(kept)
    return total


def count_weights(job: Job) -> int:
    """Numbers in the input, tied ones once."""
    return sum(torch.Size(shape).numel() for layout in job.layouts.values() for _, shape in layout.values())
